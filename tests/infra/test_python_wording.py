"""Flags in messages, as Python writes them."""

from __future__ import annotations

import pytest

from rlhf_core.infra.errors import StorageError
from rlhf_core.infra.python_wording import in_python, said_for_flags, said_for_python


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("`--resume` continues it, `--overwrite` replaces it", "`resume=True` continues it, `overwrite=True` replaces it"),
        ("--resume and --overwrite", "resume=True and overwrite=True"),
        ("`--allow-change learning_rate,ewc` takes", '`allow_change=["learning_rate", "ewc"]` takes'),
        ("--allow-change", "allow_change"),
        ("choose `--dtype bf16`", 'choose `dtype="bf16"`'),
        ("give `--output DIR` or `--max_steps 7`", "give `output=DIR` or `max_steps=7`"),
        ("give `--max_steps` 7 or more", "give `max_steps` 7 or more"),
        ("continue it by `rlhf train … --resume`", "continue it by `rlhf train … --resume`"),
        ("/tmp/a--resume/b holds --", "/tmp/a--resume/b holds --"),
    ],
)  # fmt: skip
def test_flags_become_arguments_and_commands_stay(text: str, python: str) -> None:
    assert in_python(text) == python


def test_every_part_of_an_error_is_said_so() -> None:
    with pytest.raises(StorageError) as caught, said_for_python():
        raise StorageError("needs --resume", place="--overwrite", got="--max_steps 3", fix="`--resume`")
    assert str(caught.value) == "overwrite=True: needs resume=True; got max_steps 3; fix: `resume=True`"
    assert caught.value.args == ("needs resume=True",)


def test_the_notes_of_ctrl_c_are_said_so() -> None:
    interrupt = KeyboardInterrupt()
    interrupt.add_note("after step 2: `--resume` continues")
    with pytest.raises(KeyboardInterrupt) as caught, said_for_python():
        raise interrupt
    assert caught.value.__notes__ == ["after step 2: `resume=True` continues"]


def test_the_command_line_keeps_its_flags() -> None:
    with pytest.raises(StorageError, match=r"^needs --resume$"), said_for_flags(), said_for_python():
        raise StorageError("needs --resume")


def test_further_mistakes_are_said_so() -> None:
    error = StorageError("needs --resume")
    error.also = (StorageError("give `--max_steps`"),)
    with pytest.raises(StorageError), said_for_python():
        raise error
    assert [str(one) for one in error.also] == ["give `max_steps`"]
