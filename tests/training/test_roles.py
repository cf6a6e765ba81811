"""Each model of a method is what its role says: built, placed, trained at its own rate, clipped by itself, saved, exported."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from batches import random_batch, relative
from torch import Tensor, nn

from rlhf_core import registry
from rlhf_core.config.training import ModelConfig, TrainedModelConfig, TrainerConfig, TrainingStage
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import FROZEN, TRAINED, Loss, Role, Trainer
from rlhf_core.infra.errors import ConfigError, ModelError, PluginError, RLHFError
from rlhf_core.models import PolicyModel, RewardModel, ValueModel
from rlhf_core.testing.arithmetic_task import ArithmeticTask
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible, metrics_of, require_same_run
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.disk_space import disk_need_of_files
from rlhf_core.training.job import load_job
from rlhf_core.training.loader import Loader
from rlhf_core.training.roles import set_training_mode

SMALL: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1}
ROWS = list(ArithmeticTask(terms=2, digits=1, wrong=0.0).rows("sft", 12))
BASE: dict[str, Any] = {
    "batch_size": 4, "max_length": 64, "max_steps": 2, "learning_rate": 1e-3, "lr_schedule": "constant", "warmup_ratio": 0.0,
    "logging": {"progress": False},
}  # fmt: skip


class RolesConfig(TrainerConfig):
    """Options of a method of three models."""

    critic: TrainedModelConfig | None = None
    """Null puts the value head on the policy."""
    teacher: ModelConfig | None = None
    value_scale: float = 1.0


class RolesTrainer(Trainer[RolesConfig]):
    """Imitates the data and its teacher, and values every token at 1."""

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = RolesConfig
    roles: ClassVar = {"policy": TRAINED, "value": TRAINED, "teacher": Role(trained=False, optional=True)}

    def build(self, loader: Loader) -> Mapping[str, nn.Module]:
        config, policy = self.config, loader.main()
        value = ValueModel.on(policy) if config.critic is None else loader.load("value", ValueModel, config.critic)
        models: dict[str, nn.Module] = {"policy": policy, "value": value}
        if config.teacher is not None:
            models["teacher"] = loader.load("teacher", PolicyModel, config.teacher)
        return models

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": batch.num_loss_tokens, "value": batch.num_responses}

    def loss(self, batch: Batch) -> Loss:
        nll = -self.policy.token_logps(batch).sum()
        if "teacher" in self.models:
            nll = nll + self.models["teacher"].token_logps(batch).sum()
        wrong = (self.models["value"].token_values(batch) - 1) * batch.loss_mask
        return Loss({"nll": nll, "value": self.config.value_scale * wrong.square().sum()})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: save_tiny(folder / name, seed=seed, **SMALL) for seed, name in enumerate(("policy", "critic"))}
    return made | {"teacher": save_tiny(folder / "teacher", seed=7, hidden=48, heads=2, kv_heads=1)}


def trainer_of(
    paths: Mapping[str, Path], output: Path | None = None, kind: type[Trainer] = RolesTrainer, **options: Any
) -> Any:
    return kind(
        kind.Config.parse({**BASE, **options}), model=options.pop("model", paths["policy"]), data=ROWS, output=output
    )


def fault(trainer: Trainer, kind: type[RLHFError]) -> str:
    with pytest.raises(kind) as caught:
        trainer.train()
    return caught.value.line()


# What `build` returns is what `roles` say


class Building(RolesTrainer):
    """Builds what a test says."""

    made: ClassVar[Callable[[Loader], Mapping[str, Any]]]
    roles: ClassVar = {"policy": TRAINED, "value": TRAINED, "teacher": FROZEN}

    def build(self, loader: Loader) -> Mapping[str, nn.Module]:
        return type(self).made(loader)


class Bare(nn.Linear):
    """A head that nothing can load again."""


def parts(loader: Loader) -> dict[str, Any]:
    policy = loader.main()
    teacher = PolicyModel(tiny_model(**SMALL), policy.tokenizer)
    return {"policy": policy, "value": ValueModel.on(policy), "teacher": teacher}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda loader: parts(loader) | {"draft": nn.Linear(1, 1)}, "`draft` is not among the method's `roles`"),
        (lambda loader: {"policy": loader.main()}, "returns no `value`, which is among `roles`"),
        (lambda loader: parts(loader) | {"value": Bare(2, 1)}, "`value` can't be exported: Bare has no `save_pretrained"),
        (lambda loader: parts(loader) | {"value": 3}, "`value` is not a module; got int"),
        (lambda loader: (found := parts(loader)) | {"teacher": found["policy"]}, "frozen `teacher` shares weights with the"),
        (
            lambda loader: (found := parts(loader)) | {"teacher": loader.load("teacher", PolicyModel, found["policy"])},
            "the frozen `teacher` shares weights with the trained `policy`",
        ),
        (lambda loader: parts(loader) | {"teacher": loader.reference(loader.main_model)}, "gives is the role `reference`"),
        (lambda loader: {"policy": loader.load("policy", PolicyModel, "x")}, "`policy` is loaded before the run's own"),
        (lambda loader: {**parts(loader), "x": loader.load("draft", PolicyModel, "x")}, "there is no role `draft`"),
        (lambda loader: [loader.main(), loader.main()], "`loader.main` is called twice"),
        (lambda loader: parts(loader) and loader.learning_rate("teacher", 2.0), "`teacher` is frozen, so it has no"),
        (
            lambda loader: parts(loader) and loader.load("teacher", PolicyModel, TrainedModelConfig(path="x")),
            "`teacher` is frozen, so it has no learning rate",
        ),
    ],
)  # fmt: skip
def test_what_is_not_as_declared_is_refused(paths: dict[str, Path], made: Any, said: str) -> None:
    kind: Any = type("Wrong", (Building,), {"made": staticmethod(made)})
    line = fault(trainer_of(paths, kind=kind), PluginError)
    assert said in line and "Wrong.build" in line


def test_a_model_that_is_loaded_must_be_returned(paths: dict[str, Path]) -> None:
    def made(loader: Loader) -> Mapping[str, Any]:
        found = parts(loader)
        loader.load("teacher", PolicyModel, paths["teacher"])
        return {role: found[role] for role in ("policy", "value")}

    roles = {**Building.roles, "teacher": Role(trained=False, optional=True)}
    kind: Any = type("Wrong", (Building,), {"made": staticmethod(made), "roles": roles})
    assert "loads a model for `teacher` and doesn't return it" in fault(trainer_of(paths, kind=kind), PluginError)


def test_a_role_of_which_nothing_is_trained_is_named(paths: dict[str, Path]) -> None:
    def made(loader: Loader) -> Mapping[str, Any]:
        found = parts(loader)
        found["value"] = ValueModel.on(found["teacher"]).requires_grad_(False)
        found["teacher"] = PolicyModel(tiny_model(**SMALL), tiny_tokenizer())
        return found

    kind: Any = type("Still", (Building,), {"made": staticmethod(made)})
    assert "nothing to train in `value`" in fault(trainer_of(paths, kind=kind), ConfigError)


def test_an_optional_role_may_be_left_out(paths: dict[str, Path]) -> None:
    bench = Workbench(trainer_of(paths))
    assert set(bench.trainer.models) == {"policy", "value"}


# Models that are only read


def test_a_teacher_of_another_tokenizer_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<|more|>"])
    save_tiny(tmp_path / "other", tokenizer=other, vocab_size=264, **SMALL)
    line = fault(trainer_of(paths, teacher=str(tmp_path / "other")), ModelError)
    assert (
        "the `teacher` has another vocabulary" in line
        and "264 tokens, 263 in" in line
        and str(tmp_path / "other") in line
    )


def test_a_teacher_that_has_too_few_positions_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    save_tiny(tmp_path / "short", max_positions=32, **SMALL)
    line = fault(trainer_of(paths, teacher=str(tmp_path / "short")), ConfigError)
    assert "longer than the positions of the `teacher`" in line and "64 for a model of 32" in line


def test_a_teacher_in_half_precision_beside_a_float32_run(paths: dict[str, Path]) -> None:
    bench = Workbench(trainer_of(paths, teacher={"path": str(paths["teacher"]), "precision": "bf16"}))
    teacher, policy = bench.trainer.models["teacher"], bench.trainer.policy
    layer = teacher.network.model.layers[0].self_attn.q_proj.weight
    assert layer.dtype == torch.bfloat16 and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    batch = random_batch(3, 1)
    with torch.no_grad():
        exact = PolicyModel.from_pretrained(paths["teacher"]).token_logps(batch)
        found = teacher.token_logps(batch)
        assert found.dtype == torch.float32 and 1e-5 < relative(found, exact) < 0.02
        assert (
            relative(policy.token_logps(batch), PolicyModel.from_pretrained(paths["policy"]).token_logps(batch)) < 1e-6
        )


def test_what_is_read_is_held_as_the_run_says(paths: dict[str, Path]) -> None:
    """Frozen weights of a bf16 run are held in bf16, or with `frozen_precision` in float32; layouts hold for every model."""
    for held, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        options = {"precision": "bf16", "frozen_precision": held, "batching": {"layout": "padded"}}
        teacher = Workbench(trainer_of(paths, teacher=str(paths["teacher"]), **options)).trainer.models["teacher"]
        assert teacher.network.model.layers[0].self_attn.q_proj.weight.dtype == dtype
        assert teacher.shared_forward.layout == "padded"


@pytest.mark.parametrize(
    ("precision", "options", "said"),
    [
        (
            "bf16",
            {"teacher": {"precision": "float32"}},
            "teacher.precision: every model of a run in bf16 computes in bf16",
        ),
        ("float32", {"critic": {"precision": "bf16"}}, "critic.precision: a model whose every weight is trained"),
    ],
)
def test_a_precision_that_can_not_be_had_is_refused(
    paths: dict[str, Path], precision: str, options: dict[str, Any], said: str
) -> None:
    (role,) = options
    options[role]["path"] = str(paths[role])
    assert said.replace("critic", "value") in fault(trainer_of(paths, precision=precision, **options), ConfigError)


def test_a_reward_model_may_read_tokens_of_its_own(paths: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<|more|>"])
    causal = save_tiny(tmp_path / "causal", tokenizer=other, vocab_size=264, **SMALL)
    RewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path / "reward")

    def made(loader: Loader) -> Mapping[str, Any]:
        return parts(loader) | {"teacher": loader.load("teacher", RewardModel, tmp_path / "reward", own_tokens=True)}

    kind: Any = type("Read", (Building,), {"made": staticmethod(made)})
    reward = Workbench(trainer_of(paths, kind=kind)).trainer.models["teacher"]
    assert isinstance(reward, RewardModel) and not any(p.requires_grad for p in reward.parameters())


def test_a_teacher_in_memory_is_known_by_its_weights(paths: dict[str, Path], tmp_path: Path) -> None:
    teacher = PolicyModel.from_pretrained(paths["teacher"])

    def made(loader: Loader) -> Mapping[str, Any]:
        return parts(loader) | {"teacher": loader.load("teacher", PolicyModel, teacher)}

    kind: Any = interruptible(type("Given", (Building,), {"made": staticmethod(made)}))
    trainer = trainer_of(paths, tmp_path / "run", kind, checkpoint={"every": 1})
    trainer.stop_after = 1
    with pytest.raises(StoppedEarly):
        trainer.train()
    assert trainer.models["teacher"] is teacher and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        teacher.network.model.norm.weight.add_(0.1)
    with pytest.raises(ModelError, match="the files of the model `teacher` changed"):
        trainer_of(paths, tmp_path / "run", kind, checkpoint={"every": 1}).train(resume=True)


# Trained at rates of their own


@pytest.mark.parametrize(("options", "factor"), [({"critic": {"learning_rate_factor": 10.0}}, 10), ({"critic": {}}, 1)])
def test_each_role_learns_at_its_own_rate(paths: dict[str, Path], options: dict[str, Any], factor: int) -> None:
    """AdamW's first step moves a weight by the rate, whatever its gradient."""
    options["critic"]["path"] = str(paths["critic"])
    bench = Workbench(trainer_of(paths, **options))
    before = {name: p.detach().clone() for name, p in bench.parameters.items()}
    bench.train_step(bench.window())
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in bench.parameters.items()}
    assert moved["value.head.outer.bias"] == pytest.approx(factor * 1e-3, rel=1e-3)
    assert moved["policy.model.model.norm.weight"] == pytest.approx(1e-3, rel=1e-3)


def test_what_two_roles_share_learns_at_the_rate_of_the_runs_own_model(paths: dict[str, Path]) -> None:
    """In whatever order a method names its models."""

    def made(loader: Loader) -> Mapping[str, Any]:
        policy = loader.main()
        loader.learning_rate("value", 10.0)
        return {"value": ValueModel.on(policy), "policy": policy}

    roles = {"value": TRAINED, "policy": TRAINED}
    kind: Any = type("HeadFirst", (Building,), {"made": staticmethod(made), "roles": roles})
    bench = Workbench(trainer_of(paths, kind=kind))
    own = [name for name in bench.parameters if name.startswith("value.")]
    assert sorted(own) == [f"value.head.{part}.{kind}" for part in ("inner", "outer") for kind in ("bias", "weight")]
    before = {name: p.detach().clone() for name, p in bench.parameters.items()}
    bench.train_step(bench.window())
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in bench.parameters.items()}
    assert moved["policy.model.model.norm.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["value.head.outer.bias"] == pytest.approx(1e-2, rel=1e-3)


def test_a_large_loss_of_one_role_takes_no_step_from_another(paths: dict[str, Path], tmp_path: Path) -> None:
    """Each role's gradient is clipped by its own norm: the policy's step is the same beside a value loss of thousands."""
    moved: list[dict[str, Tensor]] = []
    for scale in (1e-3, 1e4):
        critic = {"path": str(paths["critic"])}
        # So large an ε makes the step go by the size of the clipped gradient.
        options = {"optimizer": {"epsilon": 1.0}, "max_grad_norm": 0.5, "max_steps": 1, "value_scale": scale}
        trainer = trainer_of(paths, tmp_path / str(scale), critic=critic, **options)
        trainer.train()
        moved.append({name: p.detach().clone() for name, p in trainer.models.named_parameters()})
        (row,) = metrics_of(tmp_path / str(scale))
        assert row["grad_norm_policy"] > 0.5
        total = row["grad_norm_policy"] ** 2 + row["grad_norm_value"] ** 2
        assert row["grad_norm"] == pytest.approx(total**0.5, rel=1e-6)
    assert row["loss_value"] > 460 and row["grad_norm_value"] > 460
    same = [torch.equal(moved[0][name], moved[1][name]) for name in moved[0] if name.startswith("policy.")]
    assert all(same) and len(same) > 10
    assert not torch.equal(moved[0]["value.head.outer.bias"], moved[1]["value.head.outer.bias"])


class Forgetful(RolesTrainer):
    """Leaves its values out of the loss."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": batch.num_loss_tokens}

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": super().loss(batch).terms["nll"]})


@pytest.mark.parametrize("kind", [RolesTrainer, Forgetful])
def test_a_trained_role_that_learns_nothing_is_named(
    paths: dict[str, Path], kind: type[RolesTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(paths, kind=kind, critic=str(paths["critic"])).train()
    said = [message for message in caplog.messages if "no gradient" in message]
    forgotten = ["`value` is trained, and got no gradient in 2 steps: it is exported as it was"]
    assert said == (forgotten if kind is Forgetful else [])


def test_lora_on_the_critic_alone(paths: dict[str, Path]) -> None:
    critic = {"path": str(paths["critic"]), "lora": {"rank": 2, "dropout": 0.5}}
    bench = Workbench(trainer_of(paths, critic=critic))
    policy, value = bench.trainer.policy, bench.trainer.models["value"]
    assert not policy.has_adapter and all(p.requires_grad for p in policy.parameters())
    trained = [name for name in bench.parameters if name.startswith("value.")]
    assert all("lora_" in name or "head." in name for name in trained) and any("lora_" in name for name in trained)
    # Its dropout draws in training, though the run has no adapter; and the other way round.
    drawing = [part for part in value.modules() if isinstance(part, nn.Dropout) and part.p == 0.5]
    value.head.outer.weight.data.fill_(1.0)
    for name, parameter in value.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    batch = random_batch(2, 1)
    value.eval()
    still = [value.token_values(batch) for _ in range(2)]
    set_training_mode(bench.trainer, True)
    drawn = [value.token_values(batch) for _ in range(2)]
    assert drawing and torch.equal(*still) and not torch.equal(*drawn)


def test_adapters_on_a_critic_in_half_precision(paths: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """In a float32 run its base is held and multiplied in bf16, what is trained in float32; its dropout is seen to, too."""
    critic = {"path": str(paths["critic"]), "precision": "bf16", "lora": {"rank": 2}}
    bench = Workbench(trainer_of(paths, critic=critic))
    assert not [message for message in caplog.messages if "draws random numbers" in message]
    value = bench.trainer.models["value"]
    held = {p.dtype for p in value.parameters() if not p.requires_grad and p.ndim == 2}
    assert torch.bfloat16 in held and {p.dtype for p in bench.parameters.values()} == {torch.float32}
    gradient = bench.step(bench.window()).gradient
    assert all(bool(value.isfinite().all()) for value in gradient.values())
    assert any(name.startswith("value.head") for name in gradient)


def test_dropout_of_the_runs_adapters_is_not_the_critics(paths: dict[str, Path]) -> None:
    critic = {"path": str(paths["critic"]), "lora": {"rank": 2}}
    bench = Workbench(trainer_of(paths, critic=critic, lora={"rank": 2, "dropout": 0.5}))
    set_training_mode(bench.trainer, True)
    batch = random_batch(2, 1)
    for name, parameter in bench.parameters.items():
        parameter.data.fill_(0.1) if "lora_B" in name or "outer" in name else None
    assert not torch.equal(*(bench.trainer.policy.token_logps(batch) for _ in range(2)))
    assert torch.equal(*(bench.trainer.models["value"].token_values(batch) for _ in range(2)))


# Saved, resumed, exported


def variants(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    critic = {"path": str(paths["critic"]), "learning_rate_factor": 3.0}
    teacher = str(paths["teacher"])
    return {
        "apart": {"critic": critic, "teacher": teacher},
        "shared": {"teacher": teacher},
        "lora": {"critic": critic | {"lora": {"rank": 2}}, "lora": {"rank": 4}},
        "shared lora": {"lora": {"rank": 4}},
    }


@pytest.mark.parametrize("variant", ["apart", "shared", "lora", "shared lora"])
def test_several_trained_models_resume_and_load_again(paths: dict[str, Path], tmp_path: Path, variant: str) -> None:
    options = variants(paths)[variant] | {"max_steps": 4, "checkpoint": {"every": 2}}
    kind = interruptible(RolesTrainer)
    trainer = trainer_of(paths, tmp_path / "whole", kind, **options)
    trainer.train()
    broken = trainer_of(paths, tmp_path / "broken", kind, **options)
    broken.stop_after = 3
    with pytest.raises(StoppedEarly):
        broken.train()
    trainer_of(paths, tmp_path / "broken", kind, **options).train(resume=True)
    require_same_run(tmp_path / "broken", tmp_path / "whole")
    batch = random_batch(3, 1)
    policy = PolicyModel.from_pretrained(tmp_path / "whole" / "model")
    value = ValueModel.from_pretrained(tmp_path / "whole" / "model_value")
    trainer.models.eval()
    with torch.no_grad():
        assert relative(policy.token_logps(batch), trainer.policy.token_logps(batch)) < 1e-5
        expected = trainer.models["value"].token_values(batch)
        assert relative(value.token_values(batch), expected) < 1e-5 and bool(expected.any())
    assert not (tmp_path / "whole" / "model_teacher").exists()
    models = json.loads((tmp_path / "whole" / "models.json").read_text())
    assert models.keys() == {"policy", "value", *(["teacher"] if "teacher" in options else [])}
    assert all("model.safetensors" in model["files"] for model in models.values())


@pytest.mark.parametrize("role", ["teacher", "critic"])
def test_a_model_that_was_swapped_is_refused_on_a_resume(paths: dict[str, Path], tmp_path: Path, role: str) -> None:
    copied = dict(paths)
    copied[role] = shutil.copytree(paths[role], tmp_path / role)
    options = {"critic": {"path": str(copied["critic"])}, "teacher": str(copied["teacher"]), "max_steps": 2}
    kind = interruptible(RolesTrainer)
    trainer = trainer_of(copied, tmp_path / "run", kind, checkpoint={"every": 1}, **options)
    trainer.stop_after = 1
    with pytest.raises(StoppedEarly):
        trainer.train()
    shape = {"hidden": 48, "heads": 2, "kv_heads": 1} if role == "teacher" else SMALL
    save_tiny(tmp_path / role, seed=99, **shape)
    with pytest.raises(ModelError) as caught:
        trainer_of(copied, tmp_path / "run", kind, checkpoint={"every": 1}, **options).train(resume=True)
    name = "value" if role == "critic" else role
    assert f"the files of the model `{name}` changed" in caught.value.line()
    assert "model.safetensors" in caught.value.line()


def test_the_disk_holds_every_exported_model(paths: dict[str, Path], tmp_path: Path) -> None:
    """What is said beforehand is what lies there: checkpoints and both exports, each in the type that it came in."""
    halved = tmp_path / "critic"
    tiny_model(seed=1, **SMALL).to(torch.bfloat16).save_pretrained(halved)
    tiny_tokenizer().save_pretrained(halved)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rlhf_core.training.run")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        trainer_of(paths, tmp_path / "run", critic={"path": str(halved)}, max_steps=1).train()
    finally:
        logger.removeHandler(handler)
    (said,) = (message for message in messages if "writes at most" in message)
    models = 1000 * float(said.split("models of ")[1].split(" kB")[0])
    written = sum(file.stat().st_size for file in (tmp_path / "run").glob("model*/*.safetensors"))
    assert written - 40_000 < models <= written + 50  # files have headers, and the policy's tables are stored once
    alone, both = (
        disk_need_of_files(str(paths["policy"]), RolesConfig.parse(BASE | options))
        for options in ({}, {"critic": str(halved)})
    )
    assert alone is not None and both is not None
    assert both.checkpoint_bytes == 2 * alone.checkpoint_bytes and both.model_bytes == pytest.approx(
        1.5 * alone.model_bytes
    )
    assert disk_need_of_files(str(paths["policy"]), RolesConfig.parse(BASE | {"critic": "hub/name"})) is None


# Options


@pytest.fixture
def registered() -> Iterator[None]:
    registry.register("trainer", "roles", RolesTrainer)
    yield
    registry.unregister("trainer", "roles")


HERE = ["--model", "m", "--data", "d.jsonl", "--output", "o"]


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("", ["--critic", "c", "--critic.learning_rate_factor", "10", "--teacher", "t"]),
        ("", ["--critic.learning-rate-factor=10", "--critic", "c", "--teacher.path", "t"]),
        ("critic: {path: c, learning_rate_factor: 10}\nteacher: t\n", []),
        ("critic: c\nteacher:\n  path: t\n", ["--critic.learning_rate_factor", "10"]),
        ("critic: {path: x, learning_rate_factor: 10}\n", ["--critic", "c", "--teacher", "t"]),
    ],
)
def test_models_beside_the_policy_by_flag_and_by_file(
    tmp_path: Path, file: str, flags: list[str], registered: None
) -> None:
    (tmp_path / "run.yaml").write_text(f"method: roles\n{file}")
    options = load_job(tmp_path / "run.yaml" if file else "roles", flags=[*HERE, *flags]).options
    assert options.critic == TrainedModelConfig(path="c", learning_rate_factor=10.0)  # type: ignore[attr-defined]
    assert options.teacher == ModelConfig(path="t")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["policy"], "must map names to `TRAINED`, `FROZEN` or a `Role`"),
        ({"policy": True}, "must map names to"),
        ({"policy": TRAINED, "a.b": FROZEN}, "a role can't have that name; got 'a.b'"),
        ({"policy": TRAINED, "a/b": TRAINED}, "a role can't have that name"),
        ({"policy": TRAINED, "keys": FROZEN}, "a role can't have that name; got 'keys'"),
        ({"policy": TRAINED, "reference": TRAINED}, "the reference is the policy at the start"),
    ],
)
def test_roles_that_no_run_can_have_are_refused_before_anything_is_loaded(
    paths: dict[str, Path], roles: Any, said: str, tmp_path: Path
) -> None:
    kind = type("Odd", (RolesTrainer,), {"roles": roles})
    trainer = kind(RolesConfig.parse(BASE), model=tmp_path / "there is none", data=ROWS)
    assert said in fault(trainer, PluginError)


@pytest.mark.parametrize(
    ("load", "kind", "said"),
    [
        (lambda loader: [loader.load("teacher", PolicyModel, None)], ConfigError, "teacher: no model is given"),
        (
            lambda loader: [loader.load("teacher", PolicyModel, loader.main_model, precision="bf16")],
            PluginError,
            "`precision` of `teacher` can't be an argument of `loader.load`",
        ),
        (lambda loader: loader.learning_rate("value", -1.0), PluginError, "must be finite and above 0; got -1.0"),
        (lambda loader: loader.learning_rate("value", float("nan")), PluginError, "must be finite and above 0"),
    ],
)
def test_slips_in_build_are_named(
    paths: dict[str, Path], load: Callable[[Loader], Any], kind: type[RLHFError], said: str
) -> None:
    class Slipping(RolesTrainer):
        def build(self, loader: Loader) -> Mapping[str, nn.Module]:
            models = super().build(loader)
            load(loader)
            return models

    assert said in fault(Slipping(RolesConfig.parse(BASE), model=paths["policy"], data=ROWS), kind)


def test_a_role_that_is_loaded_twice_is_refused(paths: dict[str, Path]) -> None:
    class Twice(RolesTrainer):
        def build(self, loader: Loader) -> Mapping[str, nn.Module]:
            models = dict(super().build(loader))
            for _ in range(2):
                models["teacher"] = loader.load("teacher", PolicyModel, paths["critic"])
            return models

    assert "`teacher` is loaded twice" in fault(
        Twice(RolesConfig.parse(BASE), model=paths["policy"], data=ROWS), PluginError
    )
