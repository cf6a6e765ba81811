"""The registry: what is found without importing, what policy makes of it, and what a load promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core import API, registry
from rlhf_core.config.training import TrainerConfig, TrainingStage
from rlhf_core.contracts.reward import RewardFn
from rlhf_core.contracts.trainer import Loss, Trainer
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.registry.class_header import read_options

METHOD = '''
"""A module that says so when it is imported."""
import sys
sys.modules["_imported_" + __name__] = sys

from rlhf_core.config.training import TrainerConfig, TrainingStage
from rlhf_core.contracts.trainer import Loss, Trainer


class Mine(Trainer[TrainerConfig]):
    """Does what mine does.

    More about it.
    """

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = TrainerConfig

    def weights(self, batch):
        return {"nll": 1.0}

    def loss(self, batch):
        return Loss({})
'''


def one(kind: str, name: str, distribution: str | None = None) -> registry.Plugin:
    found = [p for p in registry.find(kind) if p.name == name and distribution in (None, p.distribution)]
    assert len(found) == 1, found
    return found[0]


def test_a_plugin_is_found_without_being_imported(install) -> None:
    install(
        "acme-rlhf",
        {"acme/__init__.py": "raise SystemExit(3)", "acme/mine.py": METHOD},
        trainers={"mine": "acme.mine:Mine"},
    )
    assert one("trainers", "mine").as_dict() == {
        "kind": "trainer", "name": "mine", "qualified": "acme-rlhf:mine", "distribution": "acme-rlhf", "version": "1.0",
        "summary": "Does what mine does.", "record": "sft", "stage": "sft", "api": 1, "status": "ok", "reason": "",
    }  # fmt: skip
    assert "acme" not in sys.modules and "acme.mine" not in sys.modules


def test_finding_imports_neither_torch_nor_a_plugin_nor_pydantic() -> None:
    code = (
        "import sys, json; from rlhf_core import registry; names = [p.name for p in registry.find()];"
        "heavy = ('torch', 'pydantic', 'rlhf_plugins', 'yaml', 'transformers');"
        "print(json.dumps([names, [name for name in heavy if name in sys.modules]]))"
    )
    names, imported = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert {"sft", "dpo"} <= set(names) and imported == []


def test_built_ins_are_found_and_load() -> None:
    for plugin in registry.find("trainer"):
        if plugin.distribution == "rlhf-core":
            cls = registry.get("trainer", plugin.qualified)
            assert (cls.record, cls.api) == (plugin.record, plugin.api)
            assert plugin.status == "ok" and plugin.summary.endswith(".")


def test_get_takes_names_in_any_spelling(install) -> None:
    install("acme", {"acme.py": METHOD}, trainers={"best-of-n": "acme:Mine"})
    for kind, name in [
        ("trainer", "best-of-n"), ("trainers", "Best_Of_N"), ("trainer", "acme:best_of_n"), ("trainer", "ACME:best-of-n"),
        ("trainer", "trainer:acme:best-of-n"),
    ]:  # fmt: skip
        assert registry.get(kind, name).__name__ == "Mine"
    assert registry.trainers["best_of_n"].__name__ == "Mine"
    assert "best-of-n" in registry.trainers and "best-of-n" in list(registry.trainers)
    assert "nothing" not in registry.trainers and registry.trainers.get("nothing") is None


def test_an_unknown_name_lists_the_nearest_and_all(install) -> None:
    with pytest.raises(ConfigError) as raised:
        registry.get("trainer", "dpoo")
    assert raised.value.exit_code == 2
    assert str(raised.value).startswith(
        "registry: unknown trainer `dpoo`; fix: did you mean `dpo`? (known: context_compressor, cpo, distill, dpo, "
    )
    with pytest.raises(KeyError):
        registry.trainers["dpoo"]
    with pytest.raises(ConfigError, match="unknown kind of plugin `trainr`; fix: did you mean `trainer`"):
        registry.find("trainr")


def test_two_distributions_of_one_name_are_an_error_that_names_both(install) -> None:
    install("acme-rlhf", {"acme.py": METHOD}, trainers={"dpo": "acme:Mine"})
    assert {p.status for p in registry.find("trainer") if p.name == "dpo"} == {"conflict"}
    with pytest.raises(PluginError) as raised:
        registry.get("trainer", "dpo")
    assert raised.value.exit_code == 5
    assert "`acme-rlhf:dpo`" in str(raised.value) and "`rlhf-core:dpo`" in str(raised.value)
    assert registry.get("trainer", "acme-rlhf:dpo").__module__ == "acme"
    assert registry.get("trainer", "rlhf-core:dpo").__name__ == "DPOTrainer"
    assert registry.get("trainer", "sft").__name__ == "SFTTrainer"


def test_names_that_differ_in_spelling_only_conflict_too(install) -> None:
    install("one", {"one.py": METHOD}, trainers={"my-way": "one:Mine"})
    install("two", {"two.py": METHOD}, trainers={"my_way": "two:Mine"})
    with pytest.raises(PluginError, match="offered 2 times"):
        registry.get("trainer", "my-way")


def test_a_distribution_found_twice_on_the_path_is_no_conflict(install) -> None:
    install("acme", {"acme.py": METHOD}, trainers={"mine": "acme:Mine"})
    install("acme", {"acme.py": METHOD}, version="2.0", trainers={"mine": "acme:Mine"})
    assert (one("trainer", "mine").status, one("trainer", "mine").version) == ("ok", "2.0")


def test_a_distribution_that_offers_a_name_twice_cannot_be_told_apart(install) -> None:
    install("acme", {"acme.py": METHOD, "other.py": METHOD}, trainers={"my-way": "acme:Mine", "my_way": "other:Mine"})
    with pytest.raises(PluginError, match="uninstall acme"):
        registry.get("trainer", "acme:my-way")


@pytest.mark.parametrize("entry", ["dpo", "acme-rlhf:dpo", "ACME_rlhf", "nothing, acme-rlhf"])
def test_disabling_takes_a_plugin_out_before_conflicts(install, monkeypatch, entry: str) -> None:
    install("acme-rlhf", {"acme.py": METHOD}, trainers={"dpo": "acme:Mine"})
    monkeypatch.setenv(registry.DISABLE_VARIABLE, entry)
    plugin = one("trainer", "dpo", "acme-rlhf")
    assert plugin.status == "disabled" and registry.DISABLE_VARIABLE in plugin.reason
    with pytest.raises(PluginError, match="disabled"):
        registry.get("trainer", "acme-rlhf:dpo")
    if entry != "dpo":
        assert registry.get("trainer", "dpo").__name__ == "DPOTrainer"
        assert "acme" not in sys.modules


def test_only_what_is_allowed_stays(install, monkeypatch) -> None:
    install("acme", {"acme.py": METHOD}, trainers={"mine": "acme:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "sft")
    assert one("trainer", "sft").status == "ok"
    assert {one("trainer", name).status for name in ("dpo", "mine")} == {"disabled"}
    registry.only_this_distribution()
    assert {one("trainer", name).status for name in ("sft", "dpo")} == {"ok"}
    assert one("trainer", "mine").status == "disabled"
    assert os.environ[registry.ALLOW_VARIABLE] == "rlhf-core"  # worker processes inherit it


def test_policy_entries_that_match_nothing_are_told(monkeypatch) -> None:
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "dpo, dpoo")
    assert registry.unmatched_policy() == [(registry.DISABLE_VARIABLE, "dpoo")]


BROKEN = {
    "no-module": ("acme.gone:Mine", {"acme/__init__.py": ""}, "broken", "package `acme` has no module `acme.gone`"),
    "no-package": ("nowhere.at.all:Mine", {}, "broken", "package `nowhere` isn't installed"),
    "no-class": ("acme:Other", {"acme.py": METHOD}, "broken", "class `Other` isn't defined in `acme`"),
    "syntax": ("acme:Mine", {"acme.py": "class Mine(:\n"}, "broken", "acme.py:1: invalid syntax"),
    "not-a-target": ("acme mine", {"acme.py": METHOD}, "broken", "isn't of the form `package.module:Class`"),
    "no-colon": ("acme", {"acme.py": METHOD}, "broken", "isn't of the form `package.module:Class`"),
    "re-exported": ("acme:Mine", {"acme.py": "from other import Mine"}, "broken", "an entry point names the defining module"),
    "no-record": ("acme:Mine", {"acme.py": METHOD.replace('record = "sft"', "")}, "broken", "no literal `record`"),
    "record": ("acme:Mine", {"acme.py": METHOD.replace('"sft"', '"preferences"')}, "broken", "did you mean `preference`?"),
    "api": ("acme:Mine", {"acme.py": METHOD.replace("api = 1", "api = 99")}, "wrong-api", f"written for api 99, not {API}"),
    "no-api": ("acme:Mine", {"acme.py": METHOD.replace("api = 1", "")}, "wrong-api", "no literal `api = 1`"),
    "api-not-literal": ("acme:Mine", {"acme.py": METHOD.replace("api = 1", "api = int('1')")}, "wrong-api", "no literal"),
    "api-bool": ("acme:Mine", {"acme.py": METHOD.replace("api = 1", "api = True")}, "wrong-api", "no literal"),
    "bytes": ("acme:Mine", {"acme.py": "\0"}, "broken", "null bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_listed_with_its_reason_and_hurts_nobody_else(install, case: str) -> None:
    target, files, status, reason = BROKEN[case]
    install("acme", files, trainers={"mine": target, "dpo": target})
    plugin = one("trainer", "mine")
    assert plugin.status == status and reason in plugin.reason, plugin
    with pytest.raises(PluginError) as raised:
        registry.get("trainer", "mine")
    assert raised.value.exit_code == 5
    assert "acme 1.0" in str(raised.value) and plugin.reason in str(raised.value)
    # A broken offer of a built-in's name doesn't take the name away.
    assert registry.get("trainer", "dpo").__name__ == "DPOTrainer"
    assert "acme" not in sys.modules


LOADS = {
    "raises": ("raise RuntimeError('no licence')\n" + METHOD, "importing it raised RuntimeError: no licence"),
    "exits": ("raise SystemExit(1)\n" + METHOD, "importing it raised SystemExit: 1"),
    "needs": ("import not_installed_at_all\n" + METHOD, "ModuleNotFoundError: No module named 'not_installed_at_all'"),
    "deleted": (METHOD + "\ndel Mine\n", "has no attribute 'Mine'"),
    "no-base": (METHOD.replace("(Trainer[TrainerConfig])", ""), "not a subclass of rlhf_core.Trainer"),
    "abstract": (METHOD.replace("def loss", "def lost"), "doesn't define `loss`"),
    "config": (METHOD.replace("    Config = TrainerConfig", "    Config = dict"), "`Config` is not a subclass of rlhf_core."),
    "api": (METHOD + "\nMine.api = 7\n", "written for api 7"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADS)
def test_a_load_that_fails_says_where_it_comes_from_and_is_remembered(install, case: str) -> None:
    source, reason = LOADS[case]
    install("acme", {"acme.py": source}, trainers={"mine": "acme:Mine"})
    assert one("trainer", "mine").status == "ok"
    with pytest.raises(PluginError) as raised:
        registry.get("trainer", "mine")
    assert reason in str(raised.value) and "trainer `mine` of acme 1.0 (acme:Mine)" in str(raised.value)
    assert one("trainer", "mine").status == ("wrong-api" if case == "api" else "broken")
    assert reason in one("trainer", "mine").reason
    assert registry.get("trainer", "sft").__name__ == "SFTTrainer"


def test_a_plugin_that_was_mended_loads(install) -> None:
    root = install("acme", {"acme.py": "raise RuntimeError\n" + METHOD}, trainers={"mine": "acme:Mine"})
    with pytest.raises(PluginError):
        registry.get("trainer", "mine")
    (root / "acme.py").write_text(METHOD + "\n# mended\n")
    assert registry.get("trainer", "mine").__name__ == "Mine"
    assert one("trainer", "mine").status == "ok"


def test_a_class_that_was_mended_loads(install) -> None:
    root = install("acme", {"acme.py": METHOD.replace("def loss", "def lost")}, trainers={"mine": "acme:Mine"})
    with pytest.raises(PluginError, match="doesn't define `loss`"):
        registry.get("trainer", "mine")
    (root / "acme.py").write_text(METHOD + "\n# mended\n")
    assert registry.get("trainer", "mine").__name__ == "Mine"


def test_a_malformed_table_of_one_distribution_hides_no_other(install) -> None:
    root = install("bad", {}, trainers={"x": "y:Z"})
    next(root.glob("*.dist-info/entry_points.txt")).write_text("[rlhf_core.trainers]\nno equals sign\n")
    install("acme", {"acme.py": METHOD}, trainers={"mine": "acme:Mine"})
    assert {"mine", "sft", "dpo"} <= {p.name for p in registry.find("trainer")}


class Local(Trainer[TrainerConfig]):
    """Trains in a notebook."""

    api, record, stage, Config = 1, "sft", TrainingStage.SFT, TrainerConfig

    def weights(self, batch):
        return {}

    def loss(self, batch):
        return Loss({})


def test_register_offers_a_class_in_this_process() -> None:
    registry.register("trainers", "mine", Local)
    registry.register("trainers", "mine", Local)  # a notebook cell that is run twice
    assert registry.get("trainer", "mine") is Local
    assert one("trainer", "mine").as_dict() | {"reason": ""} == {
        "kind": "trainer", "name": "mine", "qualified": "local:mine", "distribution": "local", "version": "",
        "summary": "Trains in a notebook.", "record": "sft", "stage": "sft", "api": 1, "status": "ok", "reason": "",
    }  # fmt: skip
    registry.register("trainer", "dpo", Local)
    with pytest.raises(PluginError, match="`local:dpo`"):
        registry.get("trainer", "dpo")
    assert registry.get("trainer", "local:dpo") is Local
    registry.unregister("trainer", "dpo")
    assert registry.get("trainer", "dpo").__name__ == "DPOTrainer"
    with pytest.raises(PluginError, match=r"not a subclass of rlhf_core\.RewardFn"):
        registry.register("reward", "mine", Local)
    with pytest.raises(ConfigError, match="can't be addressed"):
        registry.register("trainer", "a:b", Local)


class Brief(RewardFn):
    """Prefers fewer words."""

    api = 1

    def score(self, samples):
        return [-float(len(sample.completion.split())) for sample in samples]


def test_lookup_finds_the_kind_of_a_name() -> None:
    registry.register("reward", "brief", Brief)
    assert registry.lookup("brief").kind == "reward" and registry.lookup("rewards:local:brief").name == "brief"
    registry.register("reward", "sft", Brief)
    with pytest.raises(ConfigError, match="write `trainer:sft` or `reward:sft`"):
        registry.lookup("sft")
    assert registry.get("reward", "sft") is Brief


def test_options_are_read_from_source(install) -> None:
    source = (
        METHOD
        + '''

class MineConfig(TrainerConfig):
    LIMITS: "ClassVar[int]" = 3
    beta: float = Field(0.1, gt=0, description="Strength; larger is stronger.")
    size: int | None = None
    """Rows; larger reads more."""
'''
    )
    source = source.replace("    Config = TrainerConfig", "    Config = MineConfig")
    install("acme", {"acme.py": source}, trainers={"mine": "acme:Mine"})
    options = [(o.name, o.type, o.default, o.description) for o in read_options(one("trainer", "mine").target)]
    assert options == [
        ("beta", "number", "0.1", "Strength; larger is stronger."),
        ("size", "whole number or null", "null", "Rows; larger reads more."),
    ]


def test_a_package_of_several_roots_is_searched_in_all(install, tmp_path: Path) -> None:
    install("one", {"shared_ns/a.py": METHOD}, trainers={"a": "shared_ns.a:Mine"})
    install("two", {"shared_ns/b.py": METHOD}, trainers={"b": "shared_ns.b:Mine"})
    assert {one("trainer", name).status for name in "ab"} == {"ok"}
    assert registry.get("trainer", "a") is not registry.get("trainer", "b")
