"""GGUF files by llama.cpp's converter, which a script of the same interface stands for."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

CONVERTER = """\
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype")
given = parser.parse_args()
if (given.model / "adapter_config.json").exists():
    sys.exit("an adapter")
print("INFO:hf-to-gguf:Loading model")
if given.outtype == "tq1_0":
    print("NotImplementedError: Architecture not supported")
    sys.exit(1)
names = sorted(path.name for path in given.model.iterdir())
given.outfile.write_text(json.dumps([given.outtype, names]))
"""


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    path.parent.mkdir()
    path.write_text(CONVERTER)
    return path


@pytest.fixture(autouse=True)
def none_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RLHF_GGUF_CONVERTER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_the_converter_gets_the_folded_model(rlhf, adapter_run: Path, converter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = rlhf("export", adapter_run, "--gguf", "q8_0", "--converter", converter, "--output", out)
    assert (code, err) == (0, "") and f"gguf: {out / 'out-q8_0.gguf'}" in said
    assert (out / "out-q8_0.gguf").read_text().startswith('["q8_0", [')
    assert (out / "model.safetensors").is_file() and not any(path.name.startswith(".") for path in out.iterdir())


@pytest.mark.parametrize("how", ["variable", "directory", "path"])
def test_it_is_found_where_it_is_installed(
    rlhf, base: Path, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "path":
        found = tmp_path / "bin" / "convert_hf_to_gguf"
        found.parent.mkdir()
        found.write_text(f"#!{sys.executable}\n{CONVERTER}")
        found.chmod(0o755)
    else:
        monkeypatch.setenv("RLHF_GGUF_CONVERTER", str(converter if how == "variable" else converter.parent))
    code, said, err = rlhf("export", base, "--gguf", "--output", tmp_path / "out")
    assert (code, err) == (0, "") and (tmp_path / "out" / "out-f16.gguf").is_file() and "out-f16.gguf" in said


def test_without_it_the_command_to_run_is_printed_and_works(
    rlhf, adapter_run: Path, converter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, err = rlhf("export", adapter_run, "--gguf", "--output", out)
    assert code == 2 and "the model is exported, and not converted" in err and (out / "model.safetensors").is_file()
    program, script, *arguments = shlex.split(err.split("`")[1])
    assert (program, script) == ("python", "convert_hf_to_gguf.py")
    assert arguments == [str(out), "--outfile", str(out / "out-f16.gguf"), "--outtype", "f16"]


def test_what_goes_wrong_is_said_and_the_model_is_kept(rlhf, base: Path, converter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = rlhf("export", base, "--gguf", "tq1_0", "--converter", converter, "--output", out)
    assert code == 4 and "Architecture not supported" in err and (out / "model.safetensors").is_file()
    assert not list(out.glob("*.gguf"))
    code, _, err = rlhf("export", base, "--gguf", "Q4_K_M", "--output", tmp_path / "x")
    assert code == 2 and "llama-quantize FILE-f16.gguf FILE-q4_k_m.gguf Q4_K_M" in err
    code, _, err = rlhf("export", base, "--gguf", "f61", "--output", tmp_path / "x")
    assert code == 2 and "did you mean `f16`" in err
    code, _, err = rlhf("export", base, "--gguf", "--converter", tmp_path / "none.py", "--output", tmp_path / "x")
    assert code == 2 and "there is no converter" in err
    code, _, err = rlhf("export", base, "--converter", converter, "--output", tmp_path / "x")
    assert code == 2 and "add `--gguf`" in err
    assert not (tmp_path / "x").exists()
