"""Merging of checkpoints of any size: inputs are read and the output is written chunk by chunk."""

from rlhf_core.merging.config import MergeConfig as MergeConfig
from rlhf_core.merging.merge import MergeResult as MergeResult
from rlhf_core.merging.merge import ModelMerger as ModelMerger
from rlhf_core.merging.selection import tensor_thresholds as tensor_thresholds
from rlhf_core.merging.streams import Chunk as Chunk
from rlhf_core.merging.streams import StreamMerger as StreamMerger
from rlhf_core.merging.streams import TensorStream as TensorStream
from rlhf_core.merging.weights import is_embedding as is_embedding
from rlhf_core.merging.weights import layer_wise_interpolation as layer_wise_interpolation
from rlhf_core.merging.weights import require_one_sign as require_one_sign
from rlhf_core.merging.weights import share_of_weights as share_of_weights
