"""Methods that ship with rlhf_core. Each is found through an entry point, exactly as a third party's is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.plugin import lazy_names

if TYPE_CHECKING:
    from rlhf_plugins.mergers.breadcrumbs import BreadcrumbsConfig as BreadcrumbsConfig
    from rlhf_plugins.mergers.breadcrumbs import BreadcrumbsMerger as BreadcrumbsMerger
    from rlhf_plugins.mergers.dare import DAREConfig as DAREConfig
    from rlhf_plugins.mergers.dare import DAREMerger as DAREMerger
    from rlhf_plugins.mergers.della import DELLAConfig as DELLAConfig
    from rlhf_plugins.mergers.della import DELLAMerger as DELLAMerger
    from rlhf_plugins.mergers.greedy_soup import GreedySoupConfig as GreedySoupConfig
    from rlhf_plugins.mergers.greedy_soup import ModelSoup as ModelSoup
    from rlhf_plugins.mergers.karcher import KarcherMerger as KarcherMerger
    from rlhf_plugins.mergers.layer_wise import LayerWiseConfig as LayerWiseConfig
    from rlhf_plugins.mergers.layer_wise import LayerWiseMerger as LayerWiseMerger
    from rlhf_plugins.mergers.linear import LinearConfig as LinearConfig
    from rlhf_plugins.mergers.linear import LinearMerger as LinearMerger
    from rlhf_plugins.mergers.model_stock import ModelStockMerger as ModelStockMerger
    from rlhf_plugins.mergers.passthrough import PassthroughMerger as PassthroughMerger
    from rlhf_plugins.mergers.sce import SCEConfig as SCEConfig
    from rlhf_plugins.mergers.sce import SCEMerger as SCEMerger
    from rlhf_plugins.mergers.slerp import SlerpMerger as SlerpMerger
    from rlhf_plugins.mergers.task_arithmetic import TaskArithmeticConfig as TaskArithmeticConfig
    from rlhf_plugins.mergers.task_arithmetic import TaskArithmeticMerger as TaskArithmeticMerger
    from rlhf_plugins.mergers.ties import TIESConfig as TIESConfig
    from rlhf_plugins.mergers.ties import TIESMerger as TIESMerger
    from rlhf_plugins.mergers.uniform_soup import UniformSoupMerger as UniformSoupMerger
    from rlhf_plugins.rewards.constitutional import ConstitutionalConfig as ConstitutionalConfig
    from rlhf_plugins.rewards.constitutional import ConstitutionalRewardWrapper as ConstitutionalRewardWrapper
    from rlhf_plugins.rewards.exact_match import ExactMatchConfig as ExactMatchConfig
    from rlhf_plugins.rewards.exact_match import ExactMatchReward as ExactMatchReward
    from rlhf_plugins.rewards.format import FormatConfig as FormatConfig
    from rlhf_plugins.rewards.format import FormatReward as FormatReward
    from rlhf_plugins.rewards.judge import JudgeConfig as JudgeConfig
    from rlhf_plugins.rewards.judge import JudgeReward as JudgeReward
    from rlhf_plugins.rewards.length import LengthConfig as LengthConfig
    from rlhf_plugins.rewards.length import LengthReward as LengthReward
    from rlhf_plugins.rewards.math_verify import MathVerifyConfig as MathVerifyConfig
    from rlhf_plugins.rewards.math_verify import MathVerifyReward as MathVerifyReward
    from rlhf_plugins.rewards.numeric_answer import NumericAnswerConfig as NumericAnswerConfig
    from rlhf_plugins.rewards.numeric_answer import NumericAnswerReward as NumericAnswerReward
    from rlhf_plugins.rewards.process_reward import ProcessRewardReward as ProcessRewardReward
    from rlhf_plugins.rewards.process_reward import ProcessRewardRewardConfig as ProcessRewardRewardConfig
    from rlhf_plugins.rewards.regex import RegexConfig as RegexConfig
    from rlhf_plugins.rewards.regex import RegexReward as RegexReward
    from rlhf_plugins.rewards.repetition import RepetitionConfig as RepetitionConfig
    from rlhf_plugins.rewards.repetition import RepetitionReward as RepetitionReward
    from rlhf_plugins.rewards.reward_ensemble import EnsembleReward as EnsembleReward
    from rlhf_plugins.rewards.reward_ensemble import EnsembleRewardConfig as EnsembleRewardConfig
    from rlhf_plugins.rewards.reward_model import RewardModelReward as RewardModelReward
    from rlhf_plugins.rewards.reward_model import RewardModelRewardConfig as RewardModelRewardConfig
    from rlhf_plugins.rewards.unit_tests import UnitTestsConfig as UnitTestsConfig
    from rlhf_plugins.rewards.unit_tests import UnitTestsReward as UnitTestsReward
    from rlhf_plugins.rewards.value_model import ValueModelReward as ValueModelReward
    from rlhf_plugins.rewards.value_model import ValueModelRewardConfig as ValueModelRewardConfig
    from rlhf_plugins.samplers.adaptive import AdaptiveComputeAllocator as AdaptiveComputeAllocator
    from rlhf_plugins.samplers.beam import BeamConfig as BeamConfig
    from rlhf_plugins.samplers.beam import BeamSampler as BeamSampler
    from rlhf_plugins.samplers.best_of_n import BestOfNConfig as BestOfNConfig
    from rlhf_plugins.samplers.best_of_n import BestOfNSampler as BestOfNSampler
    from rlhf_plugins.samplers.budget_allocator import AdaptiveConfig as AdaptiveConfig
    from rlhf_plugins.samplers.confidence import ConfidenceBasedStopping as ConfidenceBasedStopping
    from rlhf_plugins.samplers.confidence import ConfidenceConfig as ConfidenceConfig
    from rlhf_plugins.samplers.dvts import DVTSConfig as DVTSConfig
    from rlhf_plugins.samplers.dvts import DVTSSampler as DVTSSampler
    from rlhf_plugins.samplers.ensemble import EnsemblePolicy as EnsemblePolicy
    from rlhf_plugins.samplers.ensemble import EnsemblePolicyConfig as EnsemblePolicyConfig
    from rlhf_plugins.samplers.generate import GenerateConfig as GenerateConfig
    from rlhf_plugins.samplers.generate import GenerateSampler as GenerateSampler
    from rlhf_plugins.samplers.mcts import MCTSConfig as MCTSConfig
    from rlhf_plugins.samplers.mcts import MCTSGenerator as MCTSGenerator
    from rlhf_plugins.samplers.particles import ParticlesConfig as ParticlesConfig
    from rlhf_plugins.samplers.particles import ParticlesSampler as ParticlesSampler
    from rlhf_plugins.samplers.refine import IterativeRefiner as IterativeRefiner
    from rlhf_plugins.samplers.refine import RefineConfig as RefineConfig
    from rlhf_plugins.samplers.speculative import SpeculativeConfig as SpeculativeConfig
    from rlhf_plugins.samplers.speculative import SpeculativeDecoder as SpeculativeDecoder
    from rlhf_plugins.trainers.context_compressor import ContextCompressorConfig as ContextCompressorConfig
    from rlhf_plugins.trainers.context_compressor import ContextCompressorTrainer as ContextCompressorTrainer
    from rlhf_plugins.trainers.cpo import CPOConfig as CPOConfig
    from rlhf_plugins.trainers.cpo import CPOTrainer as CPOTrainer
    from rlhf_plugins.trainers.distill import DistillationConfig as DistillationConfig
    from rlhf_plugins.trainers.distill import DistillationTrainer as DistillationTrainer
    from rlhf_plugins.trainers.dpo import DPOConfig as DPOConfig
    from rlhf_plugins.trainers.dpo import DPOTrainer as DPOTrainer
    from rlhf_plugins.trainers.grpo import GRPOConfig as GRPOConfig
    from rlhf_plugins.trainers.grpo import GRPOTrainer as GRPOTrainer
    from rlhf_plugins.trainers.kto import KTOConfig as KTOConfig
    from rlhf_plugins.trainers.kto import KTOTrainer as KTOTrainer
    from rlhf_plugins.trainers.orpo import ORPOConfig as ORPOConfig
    from rlhf_plugins.trainers.orpo import ORPOTrainer as ORPOTrainer
    from rlhf_plugins.trainers.ppo import PPOConfig as PPOConfig
    from rlhf_plugins.trainers.ppo import PPOTrainer as PPOTrainer
    from rlhf_plugins.trainers.ppo import ValueModelConfig as ValueModelConfig
    from rlhf_plugins.trainers.process_reward import ProcessRewardModelConfig as ProcessRewardModelConfig
    from rlhf_plugins.trainers.process_reward import ProcessRewardModelTrainer as ProcessRewardModelTrainer
    from rlhf_plugins.trainers.reward_model import RewardModelConfig as RewardModelConfig
    from rlhf_plugins.trainers.reward_model import RewardModelTrainer as RewardModelTrainer
    from rlhf_plugins.trainers.sft import SFTConfig as SFTConfig
    from rlhf_plugins.trainers.sft import SFTTrainer as SFTTrainer
    from rlhf_plugins.trainers.simpo import SimPOConfig as SimPOConfig
    from rlhf_plugins.trainers.simpo import SimPOTrainer as SimPOTrainer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "rlhf_plugins.mergers.breadcrumbs": "BreadcrumbsConfig BreadcrumbsMerger",
        "rlhf_plugins.mergers.dare": "DAREConfig DAREMerger",
        "rlhf_plugins.mergers.della": "DELLAConfig DELLAMerger",
        "rlhf_plugins.mergers.greedy_soup": "GreedySoupConfig ModelSoup",
        "rlhf_plugins.mergers.karcher": "KarcherMerger",
        "rlhf_plugins.mergers.layer_wise": "LayerWiseConfig LayerWiseMerger",
        "rlhf_plugins.mergers.linear": "LinearConfig LinearMerger",
        "rlhf_plugins.mergers.model_stock": "ModelStockMerger",
        "rlhf_plugins.mergers.passthrough": "PassthroughMerger",
        "rlhf_plugins.mergers.sce": "SCEConfig SCEMerger",
        "rlhf_plugins.mergers.slerp": "SlerpMerger",
        "rlhf_plugins.mergers.task_arithmetic": "TaskArithmeticConfig TaskArithmeticMerger",
        "rlhf_plugins.mergers.ties": "TIESConfig TIESMerger",
        "rlhf_plugins.mergers.uniform_soup": "UniformSoupMerger",
        "rlhf_plugins.rewards.constitutional": "ConstitutionalConfig ConstitutionalRewardWrapper",
        "rlhf_plugins.rewards.reward_ensemble": "EnsembleReward EnsembleRewardConfig",
        "rlhf_plugins.rewards.exact_match": "ExactMatchConfig ExactMatchReward",
        "rlhf_plugins.rewards.format": "FormatConfig FormatReward",
        "rlhf_plugins.rewards.judge": "JudgeConfig JudgeReward",
        "rlhf_plugins.rewards.unit_tests": "UnitTestsConfig UnitTestsReward",
        "rlhf_plugins.rewards.length": "LengthConfig LengthReward",
        "rlhf_plugins.rewards.math_verify": "MathVerifyConfig MathVerifyReward",
        "rlhf_plugins.rewards.numeric_answer": "NumericAnswerConfig NumericAnswerReward",
        "rlhf_plugins.rewards.regex": "RegexConfig RegexReward",
        "rlhf_plugins.rewards.repetition": "RepetitionConfig RepetitionReward",
        "rlhf_plugins.rewards.process_reward": "ProcessRewardReward ProcessRewardRewardConfig",
        "rlhf_plugins.rewards.reward_model": "RewardModelReward RewardModelRewardConfig",
        "rlhf_plugins.rewards.value_model": "ValueModelReward ValueModelRewardConfig",
        "rlhf_plugins.samplers.beam": "BeamConfig BeamSampler",
        "rlhf_plugins.samplers.adaptive": "AdaptiveComputeAllocator",
        "rlhf_plugins.samplers.best_of_n": "BestOfNConfig BestOfNSampler",
        "rlhf_plugins.samplers.budget_allocator": "AdaptiveConfig",
        "rlhf_plugins.samplers.confidence": "ConfidenceBasedStopping ConfidenceConfig",
        "rlhf_plugins.samplers.dvts": "DVTSConfig DVTSSampler",
        "rlhf_plugins.samplers.ensemble": "EnsemblePolicyConfig EnsemblePolicy",
        "rlhf_plugins.samplers.generate": "GenerateConfig GenerateSampler",
        "rlhf_plugins.samplers.mcts": "MCTSConfig MCTSGenerator",
        "rlhf_plugins.samplers.particles": "ParticlesConfig ParticlesSampler",
        "rlhf_plugins.samplers.refine": "IterativeRefiner RefineConfig",
        "rlhf_plugins.samplers.speculative": "SpeculativeConfig SpeculativeDecoder",
        "rlhf_plugins.trainers.context_compressor": "ContextCompressorConfig ContextCompressorTrainer",
        "rlhf_plugins.trainers.cpo": "CPOConfig CPOTrainer",
        "rlhf_plugins.trainers.distill": "DistillationConfig DistillationTrainer",
        "rlhf_plugins.trainers.dpo": "DPOConfig DPOTrainer",
        "rlhf_plugins.trainers.grpo": "GRPOConfig GRPOTrainer",
        "rlhf_plugins.trainers.kto": "KTOConfig KTOTrainer",
        "rlhf_plugins.trainers.orpo": "ORPOConfig ORPOTrainer",
        "rlhf_plugins.trainers.ppo": "PPOConfig PPOTrainer ValueModelConfig",
        "rlhf_plugins.trainers.process_reward": "ProcessRewardModelConfig ProcessRewardModelTrainer",
        "rlhf_plugins.trainers.reward_model": "RewardModelConfig RewardModelTrainer",
        "rlhf_plugins.trainers.sft": "SFTConfig SFTTrainer",
        "rlhf_plugins.trainers.simpo": "SimPOConfig SimPOTrainer",
    },
)
