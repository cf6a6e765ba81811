"""Post-training for language models in which every method is a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.infra.lazy import lazy_names
from rlhf_core.infra.version import API, __version__

if TYPE_CHECKING:
    from rlhf_core import registry as registry
    from rlhf_core.config.base import BaseConfig as BaseConfig
    from rlhf_core.config.capability_suites import CapabilitySuite as CapabilitySuite
    from rlhf_core.config.capability_suites import CapabilityTestsConfig as CapabilityTestsConfig
    from rlhf_core.config.evaluation import EvaluationConfig as EvaluationConfig
    from rlhf_core.config.online import OnlineConfig as OnlineConfig
    from rlhf_core.config.online import RewardConfig as RewardConfig
    from rlhf_core.config.online import SamplingConfig as SamplingConfig
    from rlhf_core.config.presets import get_7b_model_config as get_7b_model_config
    from rlhf_core.config.presets import get_70b_model_config as get_70b_model_config
    from rlhf_core.config.training import LoraConfig as LoraConfig
    from rlhf_core.config.training import ModelConfig as ModelConfig
    from rlhf_core.config.training import ReferenceConfig as ReferenceConfig
    from rlhf_core.config.training import TrainerConfig as TrainerConfig
    from rlhf_core.config.training import TrainingStage as TrainingStage
    from rlhf_core.contracts.batch import Batch as Batch
    from rlhf_core.contracts.completion import Completion as Completion
    from rlhf_core.contracts.merger import Merger as Merger
    from rlhf_core.contracts.result import TrainResult as TrainResult
    from rlhf_core.contracts.reward import RewardFn as RewardFn
    from rlhf_core.contracts.reward import Sample as Sample
    from rlhf_core.contracts.sampler import Sampler as Sampler
    from rlhf_core.contracts.trainer import Loss as Loss
    from rlhf_core.contracts.trainer import Trainer as Trainer
    from rlhf_core.data.record_datasets import GRPODataset as GRPODataset
    from rlhf_core.data.record_datasets import KTODataset as KTODataset
    from rlhf_core.data.record_datasets import PreferenceDataset as PreferenceDataset
    from rlhf_core.data.record_datasets import SFTDataset as SFTDataset
    from rlhf_core.data.record_datasets import StreamingGRPODataset as StreamingGRPODataset
    from rlhf_core.data.record_datasets import StreamingKTODataset as StreamingKTODataset
    from rlhf_core.data.record_datasets import StreamingPreferenceDataset as StreamingPreferenceDataset
    from rlhf_core.data.record_datasets import StreamingSFTDataset as StreamingSFTDataset
    from rlhf_core.evaluation.estimate import Estimate as Estimate
    from rlhf_core.evaluation.evaluation_report import EvaluationReport as EvaluationReport
    from rlhf_core.evaluation.evaluator import RLHFEvaluator as RLHFEvaluator
    from rlhf_core.generation.engine import Engine as Engine
    from rlhf_core.improvement.adversarial_validator import AdversarialValidator as AdversarialValidator
    from rlhf_core.improvement.adversarial_validator import over_optimisation as over_optimisation
    from rlhf_core.improvement.capability_tests import CapabilityRegression as CapabilityRegression
    from rlhf_core.improvement.capability_tests import CapabilityResult as CapabilityResult
    from rlhf_core.improvement.capability_tests import CapabilityTester as CapabilityTester
    from rlhf_core.improvement.elastic_weight_consolidation import (
        ElasticWeightConsolidation as ElasticWeightConsolidation,
    )
    from rlhf_core.infra.devices import DeviceManager as DeviceManager
    from rlhf_core.infra.errors import RLHFError as RLHFError
    from rlhf_core.merging.config import MergeConfig as MergeConfig
    from rlhf_core.merging.interpolation import layer_wise_interpolation as layer_wise_interpolation
    from rlhf_core.merging.merge import ModelMerger as ModelMerger
    from rlhf_core.models.attention import OptimizedAttention as OptimizedAttention
    from rlhf_core.models.compile import compile_model as compile_model
    from rlhf_core.models.context_compressor import ContextCompressor as ContextCompressor
    from rlhf_core.models.logprobs import over_vocabulary as over_vocabulary
    from rlhf_core.models.lora import apply_lora as apply_lora
    from rlhf_core.models.policy_model import PolicyModel as PolicyModel
    from rlhf_core.models.process_reward_model import ProcessRewardModel as ProcessRewardModel
    from rlhf_core.models.reward_model import RewardModel as RewardModel
    from rlhf_core.models.value_model import ValueModel as ValueModel
    from rlhf_core.pipeline.orchestrator import RLHFOrchestrator as RLHFOrchestrator
    from rlhf_core.publishing.export_model import export_model as export_model
    from rlhf_core.publishing.export_model import push_to_hub as push_to_hub
    from rlhf_core.registry.plugin_logs import setup_logging as setup_logging
    from rlhf_core.rewards.reward_factory import RewardFunctionFactory as RewardFunctionFactory
    from rlhf_core.training.checkpoint import CheckpointManager as CheckpointManager
    from rlhf_core.training.early_stopping import EarlyStopping as EarlyStopping
    from rlhf_core.training.logger import TrainingLogger as TrainingLogger
    from rlhf_core.training.optimizer import create_optimizer as create_optimizer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_core.registry": "",
        "rlhf_core.contracts.batch": "Batch",
        "rlhf_core.config.base": "BaseConfig",
        "rlhf_core.config.capability_suites": "CapabilitySuite CapabilityTestsConfig",
        "rlhf_core.config.training": "LoraConfig ModelConfig ReferenceConfig TrainerConfig TrainingStage",
        "rlhf_core.data.record_datasets": "GRPODataset KTODataset PreferenceDataset SFTDataset StreamingGRPODataset"
        " StreamingKTODataset StreamingPreferenceDataset StreamingSFTDataset",
        "rlhf_core.improvement.adversarial_validator": "AdversarialValidator over_optimisation",
        "rlhf_core.improvement.capability_tests": "CapabilityRegression CapabilityResult CapabilityTester",
        "rlhf_core.improvement.elastic_weight_consolidation": "ElasticWeightConsolidation",
        "rlhf_core.infra.errors": "RLHFError",
        "rlhf_core.infra.devices": "DeviceManager",
        "rlhf_core.registry.plugin_logs": "setup_logging",
        "rlhf_core.contracts.completion": "Completion",
        "rlhf_core.contracts.merger": "Merger",
        "rlhf_core.contracts.result": "TrainResult",
        "rlhf_core.contracts.reward": "RewardFn Sample",
        "rlhf_core.contracts.sampler": "Sampler",
        "rlhf_core.contracts.trainer": "Loss Trainer",
        "rlhf_core.merging.config": "MergeConfig",
        "rlhf_core.merging.interpolation": "layer_wise_interpolation",
        "rlhf_core.merging.merge": "ModelMerger",
        "rlhf_core.models.attention": "OptimizedAttention",
        "rlhf_core.models.compile": "compile_model",
        "rlhf_core.config.evaluation": "EvaluationConfig",
        "rlhf_core.evaluation.estimate": "Estimate",
        "rlhf_core.evaluation.evaluation_report": "EvaluationReport",
        "rlhf_core.evaluation.evaluator": "RLHFEvaluator",
        "rlhf_core.generation.engine": "Engine",
        "rlhf_core.models.logprobs": "over_vocabulary",
        "rlhf_core.models.lora": "apply_lora",
        "rlhf_core.models.policy_model": "PolicyModel",
        "rlhf_core.models.process_reward_model": "ProcessRewardModel",
        "rlhf_core.models.reward_model": "RewardModel",
        "rlhf_core.models.context_compressor": "ContextCompressor",
        "rlhf_core.models.value_model": "ValueModel",
        "rlhf_core.config.online": "OnlineConfig RewardConfig SamplingConfig",
        "rlhf_core.pipeline.orchestrator": "RLHFOrchestrator",
        "rlhf_core.config.presets": "get_70b_model_config get_7b_model_config",
        "rlhf_core.publishing.export_model": "export_model push_to_hub",
        "rlhf_core.rewards.reward_factory": "RewardFunctionFactory",
        "rlhf_core.training.checkpoint": "CheckpointManager",
        "rlhf_core.training.early_stopping": "EarlyStopping",
        "rlhf_core.training.logger": "TrainingLogger",
        "rlhf_core.training.optimizer": "create_optimizer",
    },
)
__all__ += ["API", "__version__"]
