"""What every trainer promises, as tests to inherit.

class TestDPO(TrainerContract):
    method = "dpo"  # a registered name, or `trainer = DPOTrainer`
"""

from __future__ import annotations

from rlhf_core.testing.trainer_basics import BasicChecks
from rlhf_core.testing.trainer_layout import LayoutChecks
from rlhf_core.testing.trainer_loss import LossChecks
from rlhf_core.testing.trainer_online import OnlineChecks
from rlhf_core.testing.trainer_options import OptionChecks
from rlhf_core.testing.trainer_runs import RunChecks


class TrainerContract(RunChecks, OptionChecks, OnlineChecks, LossChecks, LayoutChecks, BasicChecks):
    """The conformance tests of a trainer. They run in seconds on a tiny model, through the loop's own code."""
