"""Every component is importable from the top, by the name that users know, and loads nothing before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rlhf_core import registry

PACKAGES = ["rlhf_core", "rlhf_core.plugin", "rlhf_core.models", "rlhf_core.testing", "rlhf_plugins"]

USERS_KNOW = {
    "rlhf_core": "RewardModel ProcessRewardModel PolicyModel ValueModel SFTDataset StreamingKTODataset ModelMerger MergeConfig "
    "layer_wise_interpolation CheckpointManager EarlyStopping DeviceManager get_7b_model_config OptimizedAttention",
    "rlhf_plugins": "SFTTrainer SFTConfig RewardModelTrainer ProcessRewardModelTrainer DPOTrainer DPOConfig SimPOTrainer "
    "KTOTrainer ModelSoup TIESMerger DAREMerger",
}  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    assert len(module.__all__) == len(set(module.__all__)) and set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'Nonesuch'"):
        _ = module.Nonesuch


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_what_python_sees(package: str) -> None:
    """The names for type checkers stand apart from the table that loads them; the two must agree."""
    path = Path(str(import_module(package).__file__))
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    typed = {alias.name for block in blocks for node in ast.walk(block) if isinstance(node, ast.ImportFrom)
             for alias in node.names}  # fmt: skip
    own = {"API", "__version__", "lazy_names"}
    assert typed | own == set(import_module(package).__all__) | own


@pytest.mark.parametrize("package", USERS_KNOW)
def test_names_that_users_know(package: str) -> None:
    assert set(USERS_KNOW[package].split()) <= set(import_module(package).__all__)


def test_each_built_in_method_is_importable_with_its_configuration() -> None:
    import rlhf_plugins

    built_in = [plugin for plugin in registry.find() if plugin.distribution == "rlhf-core" and plugin.kind != "hook"]
    assert len(built_in) > 20
    for plugin in built_in:
        cls = registry.get(plugin.kind, plugin.qualified)
        assert getattr(rlhf_plugins, cls.__name__) is cls
        if cls.Config.__module__.startswith("rlhf_plugins"):
            assert getattr(rlhf_plugins, cls.Config.__name__) is cls.Config


def test_importing_the_packages_loads_no_torch() -> None:
    code = "import sys, rlhf_core, rlhf_core.plugin, rlhf_core.testing, rlhf_plugins; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
