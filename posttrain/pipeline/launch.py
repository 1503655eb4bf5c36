"""Handing a node to Ray and waiting for it: a task for single-process steps, a `TorchTrainer` for training."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.schema import RunConfig
from posttrain.pipeline.graph import Node
from posttrain.pipeline.plan import workers_demand
from posttrain.pipeline.work import WorkOrder, execute, train_loop


def preload() -> None:
    """Import what `launch` needs; takes seconds, so it is done while the first node runs."""
    import ray.train.torch  # noqa: F401


def launch(config: RunConfig, node: Node, order: WorkOrder, ray_folder: Path) -> None:
    """Run a node to its end. Called in a thread of its own: several run at once, and each only waits.

    Ray watches over the processes: a dead worker or node ends the wait with an error.

    Args:
        ray_folder: where Ray Train keeps its own records.

    Raises:
        what the step raised, wrapped by Ray (see `failures.explain_failure`).
    """
    if node.step == "train":
        _train(config, order, ray_folder)
    else:
        _run_task(config, node, order)


def _run_task(config: RunConfig, node: Node, order: WorkOrder) -> None:
    import ray

    cpus, gpus = workers_demand(config, node)  # an actor that the step starts asks for its own
    task = ray.remote(execute).options(
        num_cpus=cpus, num_gpus=gpus, max_retries=config.resources.max_failures, retry_exceptions=False, name=node.name
    )
    ray.get(task.remote(order))


def _train(config: RunConfig, order: WorkOrder, ray_folder: Path) -> None:
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = config.resources
    worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"order": order},
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=bool(resources.gpus_per_worker),
            resources_per_worker={name: amount for name, amount in worker.items() if amount},
        ),
        run_config=RayRunConfig(
            name="train",
            storage_path=str(ray_folder),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    trainer.fit()
