"""Tables of parts: names from the core, entry points, registration and paths; options; and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_core import registry
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.policy_gradient import ADVANTAGES, CLIPS, CORRECTIONS, KL_ESTIMATORS, LOSS_AGGREGATIONS, RATIOS, SHAPINGS

REWARDS, GROUPS = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
MINE = '''
def doubled(rewards, groups, *, factor: float = 2.0):
    """Return rewards times a factor."""
    return rewards * factor
'''


def test_the_names_of_the_core() -> None:
    assert ADVANTAGES.names() == [
        "batch_norm", "group_mean", "group_mean_batch_norm", "group_mean_over_mean", "group_mean_std", "leave_one_out", "none",
        "pass_at_k",
    ]  # fmt: skip
    assert RATIOS.names() == ["geometric", "geometric_token", "sequence", "token"]
    assert CLIPS.names() == ["cispo", "dppo", "gmpo", "none", "ppo", "sapo", "two_sided"]
    assert CORRECTIONS.names() == [
        "icepop", "none", "sequence_masked", "sequence_truncated", "token_masked", "token_truncated",
    ]  # fmt: skip
    assert LOSS_AGGREGATIONS.names() == ["constant", "sequence_mean", "sequence_sum", "token"]
    assert KL_ESTIMATORS.names() == ["k1", "k2", "k3"]


def test_every_part_says_what_it_returns_and_from_where() -> None:
    for table in (ADVANTAGES, RATIOS, CLIPS, CORRECTIONS, LOSS_AGGREGATIONS):
        for name in table.names():
            doc = table.get(name).__doc__ or ""
            assert doc.startswith("Return "), name
            assert (table, name) == (CORRECTIONS, "none") or "arXiv" in doc or "19" in doc or "2025" in doc, name


def test_an_entry_point_adds_a_part(install) -> None:
    install("acme", {"acme.py": MINE}, parts={"advantage.doubled": "acme:doubled"})
    assert "doubled" in ADVANTAGES.names() and "doubled" not in CLIPS.names()
    assert ADVANTAGES.bind("doubled", {"factor": 3})(REWARDS, GROUPS).tolist() == [3.0, 0.0]
    assert ADVANTAGES.get("acme:doubled") is ADVANTAGES.get("doubled")
    (plugin,) = registry.find("parts")
    assert (plugin.name, plugin.summary, plugin.status) == ("advantage.doubled", "Return rewards times a factor.", "ok")
    assert registry.faults() == []


def test_registration_adds_a_part() -> None:
    @ADVANTAGES.register("halved")
    def halved(rewards: Tensor, groups: Tensor) -> Tensor:
        return rewards / 2

    assert ADVANTAGES.get("halved") is halved
    with pytest.raises(ConfigError, match="the core has a advantage `group_mean`"):
        ADVANTAGES.register("group_mean", halved)
    with pytest.raises(PluginError, match="isn't a function"):
        ADVANTAGES.register("four", 4)


def test_a_path_names_a_part(tmp_path: Path) -> None:
    (tmp_path / "parts_of_mine.py").write_text(MINE)
    name = f"{tmp_path}/parts_of_mine.py:doubled"
    assert ADVANTAGES.bind(name, {})(REWARDS, GROUPS).tolist() == [2.0, 0.0]
    with pytest.raises(ConfigError, match=r"has no `dubled`; fix: did you mean `doubled`"):
        ADVANTAGES.get(f"{tmp_path}/parts_of_mine.py:dubled")


def test_a_part_of_the_cores_name_is_ambiguous(install) -> None:
    install("acme", {"acme.py": MINE}, parts={"advantage.group_mean": "acme:doubled"})
    with pytest.raises(PluginError, match="both the core and acme have a advantage `group_mean`"):
        ADVANTAGES.get("group_mean")
    assert ADVANTAGES.get("acme:group_mean").__name__ == "doubled"


def test_disabled_and_broken_parts(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", {"acme.py": MINE}, parts={"advantage.doubled": "acme:doubled", "advantage.gone": "acme:gone"})
    with pytest.raises(PluginError, match="broken"):
        ADVANTAGES.get("gone")
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "acme")
    with pytest.raises(PluginError, match="disabled"):
        ADVANTAGES.get("doubled")


def test_an_entry_point_without_a_kind_is_broken(install) -> None:
    install("acme", {"acme.py": MINE}, parts={"advantges.doubled": "acme:doubled"})
    (plugin,) = registry.find("part")
    assert plugin.status == "broken" and "isn't of the form `KIND.NAME`; did you mean `advantage`?" in plugin.reason


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("group_men", {}, r"unknown advantage `group_men`; fix: did you mean `group_mean`\? \(known: batch_norm"),
        ("group_mean", {"k": 2}, r"advantage `group_mean` has no option `k`; got 2; fix: leave it out"),
        ("pass_at_k", {"kk": 2}, r"has no option `kk`; got 2; fix: did you mean `k`"),
        ("pass_at_k", {"k": "many"}, r"option `k` of advantage `pass_at_k`: must be a valid integer"),
        ("pass_at_k", {"k": 0}, r"option `k` of advantage `pass_at_k`: must be greater than or equal to 1"),
        ("pass_at_k", {"k": True}, r"option `k` of advantage `pass_at_k`"),
        ("group_mean_std", {"epsilon": float("nan")}, r"option `epsilon`"),
        ("no_such_module:function", {}, r"unknown advantage `no_such_module:function`: there is no module"),
    ],
)
def test_what_is_said_of_a_wrong_part(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        ADVANTAGES.bind(name, options, place="run.yaml:3")
    assert found.value.place == "run.yaml:3"


def test_the_page_names_every_part() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/policy-gradient.md").read_text(encoding="utf-8")
    tables = (ADVANTAGES, RATIOS, CLIPS, CORRECTIONS, LOSS_AGGREGATIONS, KL_ESTIMATORS, SHAPINGS)
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    for table in tables:
        assert [f"`{name}`" for name in table.names() if f"`{name}`" not in lines[table.kind].split("|")[3]] == []
