"""How good is a backbone for a task? Head-only, after finetuning alone, and with a few examples.

Each measurement is one job, run in a worker process with one thread, so that all cores are used and none
is shared. The score is always that of the task's test split.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peer.data import DataConfig, load_task_data, tokenize
from peer.evaluate import evaluate_classifier, extract_features, head_only_score, init_head
from peer.finetune import Budget, FinetuneConfig, finetune
from peer.model import load_backbone, load_classifier, load_tokenizer, reset_head
from scripts.swarm_processes import num_usable_cores

# "head_only": the backbone as it is, a linear probe on its features (ColD-Frozen in the paper).
# "alone": the same after finetuning on the task without others, round by round as a peer does it.
# "finetuned": finetuned on the task, scored with the head that was finetuned with it.
Kind = Literal["head_only", "alone", "finetuned"]


@dataclass(frozen=True)
class Job:
    kind: Kind
    backbone: Path  # folder of a model in Hugging Face form: config, weights and tokenizer
    data: Path  # folder of the task: train.csv, validation.csv, test.csv
    finetune: FinetuneConfig = FinetuneConfig()
    num_rounds: int = 1  # in each the head is fitted again and the learning rate starts anew
    round_examples: int = 1024  # with repetition
    max_train_examples: int | None = None  # a stratified sample of the training split
    seed: int = 0  # of that sample, of the batches and of dropout


def run_job(job: Job) -> float:
    """Accuracy (0 to 1) or Pearson r on the test split. Raises DataError, ModelError."""
    import torch
    from datasets import disable_progress_bars

    torch.set_num_threads(1)
    disable_progress_bars()
    data = load_task_data(
        DataConfig(data=str(job.data), max_train_examples=job.max_train_examples, seed=job.seed)
    )
    tokenizer = load_tokenizer(job.backbone)
    model = load_classifier(job.backbone, data.task, seed=job.seed, backbone=load_backbone(job.backbone))
    train, test = (
        tokenize(split, tokenizer, job.finetune.max_length, is_pair=data.task.is_pair)
        for split in (data.train, data.test)
    )
    if job.kind != "head_only":
        for round_ in range(job.num_rounds):
            seed = job.seed + 1_000 * round_
            reset_head(model, seed)
            init_head(model, data.task, train, tokenizer, seed)
            finetune(model, train, tokenizer, job.finetune, Budget(job.round_examples, None), seed=seed)
    if job.kind == "finetuned":
        return evaluate_classifier(data.task, model, test, tokenizer)
    features = (extract_features(model, split, tokenizer) for split in (train, test))
    return head_only_score(data.task, *features)


def run_jobs(
    jobs: Sequence[Job], *, timeout_seconds: float, on_done: Callable[[int], None] = lambda num_done: None
) -> list[float | None]:
    """The scores, in the order of the jobs; None for those not done in time.

    No worker is left, whatever happens. Raises what a job raised.
    """
    ends_at = time.monotonic() + timeout_seconds
    context = multiprocessing.get_context("spawn")  # forking a process that has threads may hang
    pool = ProcessPoolExecutor(
        min(num_usable_cores(), len(jobs)), mp_context=context, initializer=_leave_interrupts_to_parent
    )
    before = set(multiprocessing.active_children())
    try:
        futures = [pool.submit(run_job, job) for job in jobs]
        pending: set[Future[float]] = set(futures)
        while pending and time.monotonic() < ends_at:
            done, pending = wait(pending, ends_at - time.monotonic(), return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # an error ends the rest at once
            on_done(len(futures) - len(pending))
        return [future.result() if future.done() else None for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
            worker.join()


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
