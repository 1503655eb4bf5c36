"""Driving an update of an engine's weights from the process that holds vLLM's `LLMEngine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from posttrain.rollout.types import WeightSource
from posttrain.rollout.vllm.calls import call_engine
from posttrain.rollout.weights.folders import remove
from posttrain.rollout.weights.manifest import WeightsRefused
from posttrain.rollout.weights.sink import EngineUnusable, deliver
from posttrain.rollout.weights.source import CheckpointSource
from posttrain.rollout.weights.store import SHARED_MEMORY, StoredWeights, publish

T = TypeVar("T")


class Driven(Protocol):
    """The part of vLLM's `LLMEngine` that an update needs; its workers have `transfer.WeightWorkerExtension`."""

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call every worker."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Drop cached blocks; False where some are in use."""
        ...

    def has_unfinished_requests(self) -> bool:
        """Whether anything is being generated."""
        ...


class VLLMWeights:
    """The `WeightSink` of a vLLM engine.

    Between requests only: one in flight would go on with keys, values and states of the old weights. A version that was served
    stays published until the next one serves, so that there is always one to go back to.

    Attributes:
        weight_version: of the weights that serve.
        usable: False once the engine has no weights to serve; every call raises EngineUnusable then.
    """

    def __init__(
        self,
        engine: Driven,
        *,
        version: int = 0,
        checkpoint: Path | None = None,
        root: Path = SHARED_MEMORY,
        timeout: float = 600.0,
    ) -> None:
        """Wrap a running engine.

        Args:
            engine: started with the backend `backends.HOST_BACKEND` and the worker extension `backends.EXTENSION`.
            version: of the weights that it started with.
            checkpoint: folder that they came from, to go back to; None for random ones, without a way back.
            root: where weights are published that come from another source than a published one.
            timeout: seconds that the workers have for one step of an update.
        """
        self.weight_version = version
        self.usable = True
        self._engine, self._root, self._timeout = engine, root, timeout
        self._checkpoint = checkpoint
        self._serving: StoredWeights | None = None
        self._staged: StoredWeights | None = None
        self._own: set[Path] = set()

    def update(self, source: WeightSource) -> None:
        """Take over new weights and their version.

        Args:
            source: read once; `StoredWeights` are used where they lie, must stay until the next update, and are not removed.

        Raises:
            WeightsRefused: a ValueError; the old weights still serve.
            EngineUnusable: nothing serves, replace the engine.
            UserError: no room to publish.
        """
        self._check()
        if isinstance(source, StoredWeights):
            deliver(source, [self])
            return
        stored = publish(source, self._root)
        self._own.add(stored.folder)
        try:
            deliver(stored, [self])
        except BaseException:
            self._remove(stored)
            raise

    def stage(self, stored: StoredWeights) -> None:
        """See `WeightSink.stage`."""
        self._check()
        self._staged = None
        self._call("posttrain_stage", str(stored.folder), stored.manifest.digest)
        self._staged = stored

    def swap(self) -> None:
        """See `WeightSink.swap`."""
        self._check()
        staged, self._staged = self._staged, None
        if staged is None:
            raise WeightsRefused("no weights are staged")
        self._swap(staged.version, staged)

    def _swap(self, version: int, staged: StoredWeights | None) -> None:
        """Let the workers load what they hold ready; None where it is published nowhere."""
        try:
            self._refuse_states_in_use()
        except WeightsRefused:
            self.discard()
            raise
        try:
            self._call("posttrain_apply")
        except WeightsRefused as error:
            self._go_back(str(error))
            raise
        before, self._serving = self._serving, staged
        self._checkpoint = None
        self.weight_version = version
        if before is not None and (staged is None or before.folder != staged.folder):
            self._remove(before)

    def discard(self) -> None:
        """See `WeightSink.discard`."""
        self._staged = None
        if self.usable:
            self._call("posttrain_discard")

    def close(self) -> None:
        """Remove what was published here; a second call does nothing."""
        for folder in list(self._own):
            self._remove(folder)

    def _check(self) -> None:
        if not self.usable:
            raise EngineUnusable("the engine lost its weights in an earlier update; replace it")

    def _call(self, method: str, *args: Any) -> int:
        """Call all workers; gives their number. WeightsRefused with what the first of them says is wrong."""
        said = self._ask(method, lambda: self._engine.collective_rpc(method, timeout=self._timeout, args=args))
        for rank, fault in enumerate(said):
            if fault:
                raise WeightsRefused(f"worker {rank}: {fault}" if len(said) > 1 else str(fault))
        return len(said)

    def _refuse_states_in_use(self) -> None:
        """Drop cached keys, values and states; WeightsRefused where a request still needs them."""
        if self._engine.has_unfinished_requests():
            raise WeightsRefused("requests are in flight, with states of the old weights; let them end or cancel them first")
        if not self._ask("reset_prefix_cache", self._engine.reset_prefix_cache):
            raise WeightsRefused("cached states of the old weights are still in use; let requests end or cancel them first")

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call_engine(self._engine, what, call, self._timeout)
        except EngineUnusable:
            self.usable = False
            raise

    def _go_back(self, fault: str) -> None:
        """Load the old weights again, after an error in the middle of loading new ones."""
        stored, borrowed = self._serving, None
        try:
            if stored is None and self._checkpoint is not None:
                stored = borrowed = publish(CheckpointSource(self._checkpoint, self.weight_version), self._root)
            if stored is None:
                raise WeightsRefused("the weights that the engine started with are nowhere to be read")
            self._call("posttrain_stage", str(stored.folder), stored.manifest.digest)
            self._call("posttrain_apply")
        except Exception as error:
            self.usable = False
            raise EngineUnusable(f"{fault}; the old weights could not be loaded again ({error})") from error
        finally:
            if borrowed is not None:
                borrowed.remove()

    def _remove(self, stored: StoredWeights | Path) -> None:
        folder = stored.folder if isinstance(stored, StoredWeights) else stored
        if folder in self._own:
            self._own.remove(folder)
            remove(folder)
