"""Where weights go: one device, several through accelerate, or in fewer bits.

    dh.load("llama-3.1-8b", dtype=torch.bfloat16)                 # the best device there is
    dh.load("llama-2-13b", device="auto", dtype=torch.bfloat16)   # layers spread over all of them, by accelerate
    dh.load("llama-3.1-8b", quantize="4bit", dtype=torch.bfloat16)

Layers are spread before the model is wrapped, so that hooks run where their layer is. Weights that accelerate would
keep in main memory or on disk beside an accelerator are refused: they are moved in for every layer of every pass, and
between passes there is nothing to share with the twin. `dhlens.plan` tells beforehand what fits.
"""

import os
import re
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

QUANTIZED = ("8bit", "4bit")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of this name, or the best one that is there.

    Raises:
        ValueError: it is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = ", ".join(kind for kind, found in there.items() if found)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"a device is cpu, cuda, cuda:1, mps or auto, got {device!r}; usable here: {usable}") from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if not there.get(found.type, False) or (found.index or 0) >= count:
        raise ValueError(f"device {found} is not there; usable here: {usable}")
    return found


def there(device: str | torch.device | None) -> str | torch.device:
    """The device that is meant; "auto" stays only where there are accelerators to spread over.

    Raises:
        ValueError: it is not there.
    """
    if device == "auto":
        return "auto" if torch.cuda.is_available() else find_device(None)
    return find_device(device)


def check_quantize(quantize: str | None) -> None:
    """Refuse a form of quantisation that is not offered.

    Raises:
        ValueError: it is none of `QUANTIZED`.
    """
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZED)}, got {quantize!r}")


def placement(
    device: str | torch.device | None, quantize: str | None, dtype: torch.dtype
) -> tuple[torch.device | None, dict[str, Any]]:
    """Where to move the loaded model (None: it is placed while it loads), and what `from_pretrained` needs besides.

    Raises:
        ValueError: no such device or form of quantisation.
        ModuleNotFoundError: what this needs is not installed; said before anything is downloaded.
    """
    check_quantize(quantize)
    spread = device == "auto"
    one = None if spread else find_device(device)
    if spread:
        _need("accelerate", "spreading a model over devices")
    if quantize is not None:
        _need("accelerate", f"quantize={quantize!r}")
        _need("bitsandbytes", f"quantize={quantize!r}")
    if quantize is None:
        return (None, {"device_map": "auto"}) if spread else (one, {})
    bits: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "4bit":
        # nf4 is the 4-bit form that QLoRA (arXiv 2305.14314) found closest to the full weights
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return None, {"quantization_config": BitsAndBytesConfig(**bits), "device_map": "auto" if spread else {"": one}}


def _need(package: str, asked: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{asked} needs the package {package}: pip install 'dhlens[big]'")


def refuse_offloaded(hf: Any) -> None:
    """Refuse a model whose weights lie elsewhere than where they are computed with.

    Raises:
        ValueError: they do; the message names the parts.
    """
    places = {part: str(place) for part, place in (getattr(hf, "hf_device_map", None) or {}).items()}
    accelerated = any(place not in ("cpu", "disk") for place in places.values())
    parts = [part for part, place in places.items() if place == "disk" or (place == "cpu" and accelerated)]
    if not parts:
        parts = [name for name, p in hf.named_parameters() if p.is_meta]
    if parts:
        more = " and more" if len(parts) > 3 else ""
        raise ValueError(
            f"weights must lie on the devices that compute; {', '.join(parts[:3])}{more} "
            "would be moved in for every pass: take larger devices, bfloat16 or quantize= (dhlens plan tells sizes)"
        )


def memory_of(device: str | torch.device | None) -> int:
    """Bytes of memory of a device; of all accelerators for "auto".

    Raises:
        ValueError: it is not there.
    """
    found = there(device)
    if isinstance(found, str):
        return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    if found.type == "cuda":
        return torch.cuda.get_device_properties(found).total_memory
    if found.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_size(size: str | int) -> int:
    """Bytes of "80GB", "79.6 GiB" or a plain number.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", str(size).upper())
    if match is None or not float(match[1]):
        raise ValueError(f"a memory size reads like 80GB, 24GiB or a number of bytes, got {size!r}")
    return int(float(match[1]) * _UNITS[match[2]])
