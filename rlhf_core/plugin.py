"""All that a plugin imports from the project, from one place.

    from rlhf_core.plugin import Batch, Loss, Trainer, TrainerConfig

Names are loaded when they are first used, so a plugin that needs no model imports none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.infra.lazy import lazy_names as lazy_names

if TYPE_CHECKING:
    from rlhf_core.config.answering_options import AnsweringModelConfig as AnsweringModelConfig
    from rlhf_core.config.base import BaseConfig as BaseConfig
    from rlhf_core.config.online import OnlineConfig as OnlineConfig
    from rlhf_core.config.online import RewardConfig as RewardConfig
    from rlhf_core.config.online import SamplingConfig as SamplingConfig
    from rlhf_core.config.training import LoraConfig as LoraConfig
    from rlhf_core.config.training import ModelConfig as ModelConfig
    from rlhf_core.config.training import ReferenceConfig as ReferenceConfig
    from rlhf_core.config.training import TrainedModelConfig as TrainedModelConfig
    from rlhf_core.config.training import TrainerConfig as TrainerConfig
    from rlhf_core.config.training import TrainingStage as TrainingStage
    from rlhf_core.contracts.batch import Batch as Batch
    from rlhf_core.contracts.completion import Completion as Completion
    from rlhf_core.contracts.merger import Merger as Merger
    from rlhf_core.contracts.records import Message as Message
    from rlhf_core.contracts.records import Prompt as Prompt
    from rlhf_core.contracts.reward import RewardFn as RewardFn
    from rlhf_core.contracts.reward import Sample as Sample
    from rlhf_core.contracts.reward import SampleError as SampleError
    from rlhf_core.contracts.reward import ScoreWithParts as ScoreWithParts
    from rlhf_core.contracts.reward import StepReader as StepReader
    from rlhf_core.contracts.sampler import Sampler as Sampler
    from rlhf_core.contracts.trainer import FROZEN as FROZEN
    from rlhf_core.contracts.trainer import TRAINED as TRAINED
    from rlhf_core.contracts.trainer import Evaluation as Evaluation
    from rlhf_core.contracts.trainer import Loss as Loss
    from rlhf_core.contracts.trainer import Pair as Pair
    from rlhf_core.contracts.trainer import Role as Role
    from rlhf_core.contracts.trainer import Trainer as Trainer
    from rlhf_core.contracts.trainer import Window as Window
    from rlhf_core.data.collate import collate as collate
    from rlhf_core.data.encoded_data import EncodedData as EncodedData
    from rlhf_core.data.encoder import EncodedRow as EncodedRow
    from rlhf_core.data.step_labels import NO_LABEL as NO_LABEL
    from rlhf_core.data.step_labels import RIGHT as RIGHT
    from rlhf_core.data.step_labels import WRONG as WRONG
    from rlhf_core.data.step_labels import read_step_labels as read_step_labels
    from rlhf_core.evaluation.report.write import write_report as write_report
    from rlhf_core.generation.answering_model import AnsweringModel as AnsweringModel
    from rlhf_core.generation.answering_model import prompt_text as prompt_text
    from rlhf_core.generation.draft_model import ModelDrafter as ModelDrafter
    from rlhf_core.generation.drafting import Drafter as Drafter
    from rlhf_core.generation.drafting import DraftRow as DraftRow
    from rlhf_core.generation.drafting import Drafts as Drafts
    from rlhf_core.generation.drafting import Guesses as Guesses
    from rlhf_core.generation.engine import Engine as Engine
    from rlhf_core.generation.engine import whole_count as whole_count
    from rlhf_core.generation.ensemble_backend import EnsembleBackend as EnsembleBackend
    from rlhf_core.generation.ensemble_backend import checked_weights as checked_weights
    from rlhf_core.generation.generate import PromptTooLong as PromptTooLong
    from rlhf_core.generation.generate import prompt_batch as prompt_batch
    from rlhf_core.generation.logprob_gap import logprob_gap as logprob_gap
    from rlhf_core.generation.lookup_drafts import NgramDrafter as NgramDrafter
    from rlhf_core.generation.lookup_drafts import SuffixDrafter as SuffixDrafter
    from rlhf_core.generation.model_step_readers import ModelStepReader as ModelStepReader
    from rlhf_core.generation.model_step_readers import ProcessRewardReader as ProcessRewardReader
    from rlhf_core.generation.model_step_readers import ValueReader as ValueReader
    from rlhf_core.generation.sampler_models import best_first as best_first
    from rlhf_core.generation.step_search import StepSearchSampler as StepSearchSampler
    from rlhf_core.generation.step_trees import SearchStep as SearchStep
    from rlhf_core.generation.step_trees import StepSearchConfig as StepSearchConfig
    from rlhf_core.generation.step_trees import StepTrees as StepTrees
    from rlhf_core.generation.step_trees import distinct_first as distinct_first
    from rlhf_core.generation.tree_picture import tree_svg as tree_svg
    from rlhf_core.infra.chat_api import ChatAPI as ChatAPI
    from rlhf_core.infra.child_calls import CallFailure as CallFailure
    from rlhf_core.infra.child_calls import ChildCalls as ChildCalls
    from rlhf_core.infra.child_calls import shared_calls as shared_calls
    from rlhf_core.infra.devices import DeviceManager as DeviceManager
    from rlhf_core.infra.errors import ConfigError as ConfigError
    from rlhf_core.infra.errors import DataError as DataError
    from rlhf_core.infra.errors import ModelError as ModelError
    from rlhf_core.infra.errors import NumbersError as NumbersError
    from rlhf_core.infra.errors import PluginError as PluginError
    from rlhf_core.infra.errors import shortened as shortened
    from rlhf_core.infra.model_files import file_hashes as file_hashes
    from rlhf_core.infra.seeds import random_generator as random_generator
    from rlhf_core.infra.statistics import auc as auc
    from rlhf_core.infra.statistics import calibration_error as calibration_error
    from rlhf_core.infra.untrusted_code import CodeLimits as CodeLimits
    from rlhf_core.infra.untrusted_code import run_untrusted as run_untrusted
    from rlhf_core.merging import CHUNK as CHUNK
    from rlhf_core.merging import Chunk as Chunk
    from rlhf_core.merging import MergeInput as MergeInput
    from rlhf_core.merging import ModelMerger as ModelMerger
    from rlhf_core.merging import TensorStream as TensorStream
    from rlhf_core.merging import is_embedding as is_embedding
    from rlhf_core.merging import kept_count as kept_count
    from rlhf_core.merging import magnitudes as magnitudes
    from rlhf_core.merging import merge_tensor as merge_tensor
    from rlhf_core.merging import require_one_sign as require_one_sign
    from rlhf_core.merging import share_of_weights as share_of_weights
    from rlhf_core.merging import tensor_thresholds as tensor_thresholds
    from rlhf_core.merging import thresholds as thresholds
    from rlhf_core.models import ContextCompressor as ContextCompressor
    from rlhf_core.models import HiddenStates as HiddenStates
    from rlhf_core.models import PolicyModel as PolicyModel
    from rlhf_core.models import ProcessRewardModel as ProcessRewardModel
    from rlhf_core.models import RewardModel as RewardModel
    from rlhf_core.models import ValueModel as ValueModel
    from rlhf_core.models import check_reader as check_reader
    from rlhf_core.models import context_span as context_span
    from rlhf_core.models import exact_log_softmax as exact_log_softmax
    from rlhf_core.models import over_vocabulary as over_vocabulary
    from rlhf_core.models import with_soft_tokens as with_soft_tokens
    from rlhf_core.models.batch_values import batch_values as batch_values
    from rlhf_core.models.dropout import evaluating as evaluating
    from rlhf_core.models.model_reward import ModelReward as ModelReward
    from rlhf_core.models.model_reward import ModelRewardConfig as ModelRewardConfig
    from rlhf_core.models.model_reward import SampleScores as SampleScores
    from rlhf_core.models.model_reward import ScoringModelConfig as ScoringModelConfig
    from rlhf_core.models.reasoning_steps import AGGREGATIONS as AGGREGATIONS
    from rlhf_core.models.reasoning_steps import step_ends as step_ends
    from rlhf_core.models.reference import Reference as Reference
    from rlhf_core.policy_gradient.advantages import ADVANTAGES as ADVANTAGES
    from rlhf_core.policy_gradient.aggregations import LOSS_AGGREGATIONS as LOSS_AGGREGATIONS
    from rlhf_core.policy_gradient.clips import CLIPS as CLIPS
    from rlhf_core.policy_gradient.clips import PolicyTerms as PolicyTerms
    from rlhf_core.policy_gradient.clips import clipped_tokens as clipped_tokens
    from rlhf_core.policy_gradient.corrections import CORRECTIONS as CORRECTIONS
    from rlhf_core.policy_gradient.gae import adapted_kl_weight as adapted_kl_weight
    from rlhf_core.policy_gradient.gae import explained_variance as explained_variance
    from rlhf_core.policy_gradient.gae import generalized_advantages as generalized_advantages
    from rlhf_core.policy_gradient.gae import token_rewards as token_rewards
    from rlhf_core.policy_gradient.gae import value_loss as value_loss
    from rlhf_core.policy_gradient.gae import whitened as whitened
    from rlhf_core.policy_gradient.kl_estimators import KL_ESTIMATORS as KL_ESTIMATORS
    from rlhf_core.policy_gradient.part_options import PolicyGradientConfig as PolicyGradientConfig
    from rlhf_core.policy_gradient.part_options import refusing as refusing
    from rlhf_core.policy_gradient.part_options import require_part as require_part
    from rlhf_core.policy_gradient.part_table import PartTable as PartTable
    from rlhf_core.policy_gradient.ratios import RATIOS as RATIOS
    from rlhf_core.policy_gradient.reward_shaping import SHAPINGS as SHAPINGS
    from rlhf_core.policy_gradient.reward_shaping import RewardTerms as RewardTerms
    from rlhf_core.registry.hooks import hookimpl as hookimpl
    from rlhf_core.rewards import Rewards as Rewards
    from rlhf_core.rewards import Scores as Scores
    from rlhf_core.rewards import open_rewards as open_rewards
    from rlhf_core.rewards import samples_of as samples_of
    from rlhf_core.rewards.answer_reward import AnswerReward as AnswerReward
    from rlhf_core.rewards.answer_reward import AnswerRewardConfig as AnswerRewardConfig
    from rlhf_core.rewards.answer_reward import column_of as column_of
    from rlhf_core.rewards.answer_reward import number_of as number_of
    from rlhf_core.rewards.answer_reward import with_stop as with_stop
    from rlhf_core.rewards.answer_votes import answer_key as answer_key
    from rlhf_core.rewards.answer_votes import is_decided as is_decided
    from rlhf_core.rewards.answer_votes import tally as tally
    from rlhf_core.rewards.final_answer import FinalAnswer as FinalAnswer
    from rlhf_core.rewards.final_answer import Thinking as Thinking
    from rlhf_core.rewards.final_answer import after_thinking as after_thinking
    from rlhf_core.rewards.final_answer import find_answer as find_answer
    from rlhf_core.rewards.written_number import WrittenNumber as WrittenNumber
    from rlhf_core.rewards.written_number import numbers_in as numbers_in
    from rlhf_core.rewards.written_number import only_number as only_number
    from rlhf_core.rewards.written_number import read_number as read_number
    from rlhf_core.training.context import RunContext as RunContext
    from rlhf_core.training.loader import Loader as Loader
    from rlhf_core.training.online_metrics import logprob_gaps as logprob_gaps
    from rlhf_core.training.online_metrics import online_metrics as online_metrics
    from rlhf_core.training.pairs import chosen_nll as chosen_nll
    from rlhf_core.training.pairs import logistic_loss as logistic_loss
    from rlhf_core.training.pairs import pair_accuracy as pair_accuracy
    from rlhf_core.training.pairs import pair_metrics as pair_metrics
    from rlhf_core.training.pairs import response_tokens as response_tokens

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.contracts.batch": "Batch",
        "rlhf_core.config.base": "BaseConfig",
        "rlhf_core.config.training": "LoraConfig ModelConfig ReferenceConfig TrainedModelConfig TrainerConfig TrainingStage",
        "rlhf_core.data.encoded_data": "EncodedData",
        "rlhf_core.data.collate": "collate",
        "rlhf_core.data.step_labels": "NO_LABEL RIGHT WRONG read_step_labels",
        "rlhf_core.infra.errors": "ConfigError DataError ModelError NumbersError PluginError shortened",
        "rlhf_core.registry.hooks": "hookimpl",
        "rlhf_core.evaluation.report.write": "write_report",
        "rlhf_core.policy_gradient.advantages": "ADVANTAGES",
        "rlhf_core.policy_gradient.aggregations": "LOSS_AGGREGATIONS",
        "rlhf_core.policy_gradient.clips": "CLIPS PolicyTerms clipped_tokens",
        "rlhf_core.policy_gradient.corrections": "CORRECTIONS",
        "rlhf_core.policy_gradient.gae": "adapted_kl_weight explained_variance generalized_advantages token_rewards value_loss"
        " whitened",
        "rlhf_core.policy_gradient.kl_estimators": "KL_ESTIMATORS",
        "rlhf_core.policy_gradient.part_options": "PolicyGradientConfig refusing require_part",
        "rlhf_core.policy_gradient.part_table": "PartTable",
        "rlhf_core.policy_gradient.ratios": "RATIOS",
        "rlhf_core.policy_gradient.reward_shaping": "SHAPINGS RewardTerms",
        "rlhf_core.infra.lazy": "lazy_names",
        "rlhf_core.contracts.completion": "Completion",
        "rlhf_core.contracts.merger": "Merger",
        "rlhf_core.contracts.reward": "RewardFn Sample SampleError ScoreWithParts StepReader",
        "rlhf_core.contracts.sampler": "Sampler",
        "rlhf_core.contracts.trainer": "FROZEN TRAINED Evaluation Loss Pair Role Trainer Window",
        "rlhf_core.merging": "CHUNK Chunk MergeInput ModelMerger TensorStream is_embedding kept_count magnitudes merge_tensor"
        " require_one_sign share_of_weights tensor_thresholds thresholds",
        "rlhf_core.models": "PolicyModel ProcessRewardModel RewardModel ValueModel HiddenStates exact_log_softmax"
        " over_vocabulary ContextCompressor check_reader context_span with_soft_tokens",
        "rlhf_core.data.encoder": "EncodedRow",
        "rlhf_core.generation.draft_model": "ModelDrafter",
        "rlhf_core.generation.drafting": "DraftRow Drafter Drafts Guesses",
        "rlhf_core.generation.engine": "Engine whole_count",
        "rlhf_core.generation.ensemble_backend": "EnsembleBackend checked_weights",
        "rlhf_core.generation.generate": "PromptTooLong prompt_batch",
        "rlhf_core.generation.logprob_gap": "logprob_gap",
        "rlhf_core.generation.lookup_drafts": "NgramDrafter SuffixDrafter",
        "rlhf_core.generation.model_step_readers": "ModelStepReader ProcessRewardReader ValueReader",
        "rlhf_core.models.reasoning_steps": "AGGREGATIONS step_ends",
        "rlhf_core.models.reference": "Reference",
        "rlhf_core.models.model_reward": "ModelReward ModelRewardConfig SampleScores ScoringModelConfig",
        "rlhf_core.generation.sampler_models": "best_first",
        "rlhf_core.generation.step_search": "StepSearchSampler",
        "rlhf_core.generation.tree_picture": "tree_svg",
        "rlhf_core.generation.step_trees": "SearchStep StepSearchConfig StepTrees distinct_first",
        "rlhf_core.models.batch_values": "batch_values",
        "rlhf_core.models.dropout": "evaluating",
        "rlhf_core.config.online": "OnlineConfig RewardConfig SamplingConfig",
        "rlhf_core.contracts.records": "Message Prompt",
        "rlhf_core.rewards": "Rewards Scores open_rewards samples_of",
        "rlhf_core.rewards.answer_reward": "AnswerReward AnswerRewardConfig column_of number_of with_stop",
        "rlhf_core.rewards.answer_votes": "answer_key is_decided tally",
        "rlhf_core.rewards.final_answer": "FinalAnswer Thinking after_thinking find_answer",
        "rlhf_core.rewards.written_number": "WrittenNumber numbers_in only_number read_number",
        "rlhf_core.infra.child_calls": "CallFailure ChildCalls shared_calls",
        "rlhf_core.infra.chat_api": "ChatAPI",
        "rlhf_core.config.answering_options": "AnsweringModelConfig",
        "rlhf_core.generation.answering_model": "AnsweringModel prompt_text",
        "rlhf_core.infra.untrusted_code": "CodeLimits run_untrusted",
        "rlhf_core.infra.devices": "DeviceManager",
        "rlhf_core.infra.model_files": "file_hashes",
        "rlhf_core.infra.seeds": "random_generator",
        "rlhf_core.infra.statistics": "auc calibration_error",
        "rlhf_core.training.context": "RunContext",
        "rlhf_core.training.loader": "Loader",
        "rlhf_core.training.online_metrics": "logprob_gaps online_metrics",
        "rlhf_core.training.pairs": "chosen_nll logistic_loss pair_accuracy pair_metrics response_tokens",
    },
)
