"""Fine-tuning without a recipe: own pairs make a model better at what it does, with defaults that work from 500 pairs up.

It is one stage on the same path as `unimodal fit`: the same task and data, Lightning's trainer, the proof that what is frozen stands still,
and checkpoints that no kill can spoil. The same call goes on where an interrupted one stopped.
"""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
import torch

from unimodal import arguments, files
from unimodal.data.module import PairData
from unimodal.data.pairs import Pairs
from unimodal.finetuning.card import lineage
from unimodal.finetuning.place import LOCK, REPORT, TRAINING, begin, finished, require_free
from unimodal.finetuning.plan import Plan, Train, choose_jobs, make_plan
from unimodal.finetuning.split import Splits, open_pairs
from unimodal.finetuning.table import Row, evaluation_settings, measure, score, table
from unimodal.hub import save_checkpoint
from unimodal.stages import table as parts_table
from unimodal.tasks import BestWeights, Joint, LocalCheckpoints, LossLog, Resume, StageProof
from unimodal.tasks.resume import find_resume, remove_resume
from unimodal.tasks.start import Start

EPOCHS = {"heads": 40, "lora": 10, "all": 10}
LARGEST_BATCH = {"heads": 256, "lora": 64, "all": 64}
CHECKPOINT_EVERY = 50  # optimizer steps
CAPTIONED = {"val": 50, "test": 200}  # images that are captioned, while it trains and for the table


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning left.

    Attributes:
        folder: the checkpoint, which `unimodal.from_pretrained` opens.
        rows: the table before and after.
        report: what `finetune.json` in the folder holds, `rows` and the protocol included.
    """

    folder: Path
    rows: list[Row]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Wishes:
    """What was asked for, checked."""

    model: str
    out: Path
    train: str
    seed: int
    epochs: int
    learning_rate: float | None
    device: torch.device

    @classmethod
    def checked(
        cls, model: Any, out: Any, train: Any, seed: Any, epochs: Any, learning_rate: Any, device: Any
    ) -> "_Wishes":
        train = arguments.choice(train, "train", get_args(Train))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if learning_rate is not None:
            learning_rate = arguments.number(learning_rate, "learning_rate", above=0)
        return cls(
            model=str(arguments.path(model, "model")),
            out=arguments.path(out, "out"),
            train=train,
            seed=arguments.integer(seed, "seed", least=0),
            epochs=EPOCHS[train] if epochs is None else arguments.integer(epochs, "epochs"),
            learning_rate=learning_rate,
            device=arguments.device(device),
        )


def finetune(
    model: str | Path,
    pairs: str | Path | Pairs,
    out: str | Path = "checkpoints/finetuned",
    *,
    images: str | Path | None = None,
    val: str | Path | Pairs | None = None,
    train: Train = "heads",
    jobs: list[str] | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    device: str | torch.device | None = None,
) -> Finetuned:
    """Train a model on own pairs, keep the best step, and measure what changed.

    Args:
        model: a checkpoint or a published model: a folder or a Hub id.
        pairs: a table, a JSON file in Karpathy's format, shards, a folder, or an opened split. Splits of its own are taken as they are.
        out: folder of the result.
        images: folder of the pictures; by default as the data's reader has it.
        val: the validation split, likewise; None takes the data's own, or holds a tenth of the images out, each with all its captions.
        train: `heads` trains what stands behind the towers, `lora` also low-rank matrices in the towers' layers, which are folded into the
            weights at the end, `all` everything.
        jobs: of embedding, matching and captioning what to train; None trains all that the model has.
        seed: what the split and all randomness follow from.
        epochs: passes over the training images at most; None takes 40 for heads, else 10. Training ends earlier when a quarter
            of them, at least five, were no better on the validation images.
        batch_size: images of a step; None takes a quarter of them, at most 256 for heads, else 64.
        learning_rate: peak rate; None takes the one that fits `train`.
        device: where to train; None takes a GPU where there is one.

    Raises:
        ValueError, FileNotFoundError: the model, the data or the wishes do not fit together; each message says what to do.
        FileExistsError: `out` holds something else. Nothing is replaced.
        unimodal.tasks.Interrupted: the system asked it to end; the same call goes on.
    """
    wishes = _Wishes.checked(model, out, train, seed, epochs, learning_rate, device)
    paths = [one for one in (model, pairs, images, val) if isinstance(one, str | Path)]
    require_free(wishes.out, paths)
    splits = open_pairs(pairs, images, val, wishes.seed)
    start = Start.open(wishes.model)
    wanted = None if jobs is None else arguments.listed(jobs, "jobs", "names")
    chosen = choose_jobs(start.model, wanted, wishes.model)
    plan = make_plan(start.model, chosen, wishes.train, wishes.learning_rate)
    settings = {
        **{name: getattr(wishes, name) for name in ("model", "train", "seed", "epochs")},
        "jobs": list(chosen),
        "batch_size": _batch_size(batch_size, wishes.train, len(splits.train)),
        "learning_rate": plan.optimizer.lr,
        **{f"{split} data": pairs.fingerprint() for split, pairs in splits._asdict().items()},
    }
    (wishes.out / TRAINING).mkdir(parents=True, exist_ok=True)
    with files.locked(wishes.out / TRAINING / LOCK, f"{wishes.out}: the folder of this fine-tuning"):
        begin(wishes.out, settings)
        if finished(wishes.out) is None:
            _run(wishes, start, plan, splits, chosen, settings)
        report = finished(wishes.out)
    assert report is not None
    return Finetuned(wishes.out, [Row.read(row) for row in report["rows"]], report)


def _run(
    wishes: _Wishes, start: Start, plan: Plan, splits: Splits, jobs: tuple[str, ...], settings: dict[str, Any]
) -> None:
    """Train, measure both models, save."""
    task = Joint(
        plan.config,
        plan.objectives,
        plan.trainable,
        plan.optimizer,
        evaluation_settings(jobs, CAPTIONED["val"]),
        init_from=wishes.model,
        seed=wishes.seed,
        gradient_checkpointing=wishes.train != "heads",  # towers that train keep a lot of every picture
    )
    parts = parts_table(task.model, task.factors)
    cached = wishes.train == "heads" and not task.model.backbone.whole
    best, resume = _fit(wishes, task, splits, jobs, settings["batch_size"], cached)
    model = task.whole_model()
    if wishes.train == "lora":
        model.merge_adapters()
    assert task.processor is not None
    before, after = measure(
        [start.model, model],
        task.processor,
        splits.test,
        evaluation_settings(start.model.jobs, CAPTIONED["test"]),
        wishes.device,
        same_towers=cached,
    )
    rows = table(before, after, splits.test, wishes.seed)
    split = "val" if splits.chosen_on_test else "test"
    report = {
        **settings,
        "measured_on": split,
        "chose_the_best_step": splits.chosen_on_test,
        "images": {name: len(pairs) for name, pairs in splits._asdict().items()},
        "protocol": {stage: ranks.protocol.label() for stage, ranks in after.get("ranks", {}).items()}
        | ({"captions": after["captions"].protocol.label()} if "captions" in after else {}),
        "best_step": best.step,
        "validation": best.scores,
        "steps": best.scores[-1][0],
        "seconds": resume.seconds,
        "trained": {row["part"]: row["trained"] for row in parts if row["trained"]},
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": [asdict(row) for row in rows],
    }
    names = {"retrieval_first": "first stage", "retrieval_reranked": "reranked", "captions": "captions"}
    measured = [(name, after[key]) for key, name in names.items() if key in after]
    card = lineage(wishes.model, splits.train.name, report)
    save_checkpoint(model.cpu().eval(), task.processor, wishes.out, metrics=measured, card=card, prompts=task.prompts)
    files.write_json(wishes.out / REPORT, report)
    remove_resume(wishes.out / TRAINING)
    shutil.rmtree(wishes.out / TRAINING / "features", ignore_errors=True)


def _fit(
    wishes: _Wishes, task: Joint, splits: Splits, jobs: tuple[str, ...], batch_size: int, cached: bool
) -> tuple[BestWeights, Resume]:
    """Train; what frozen towers make of the images is kept for the time of the training (`cached`)."""
    folder = wishes.out / TRAINING
    data = PairData(
        splits.train,
        splits.val,
        batch_size=batch_size,
        seed=wishes.seed,
        feature_cache=str(folder / "features") if cached else None,
        cached_features=("image", "text"),
        false_captions=0,
    )
    best = BestWeights(lambda results: score(results, jobs), patience=max(5, wishes.epochs // 4))
    resume = Resume(CHECKPOINT_EVERY)
    on_gpu = wishes.device.type == "cuda"
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else wishes.device.type,
        devices=[wishes.device.index or 0] if on_gpu else 1,
        precision="bf16-mixed" if on_gpu else "32-true",
        max_epochs=wishes.epochs,
        num_sanity_val_steps=-1,  # the weights before the first step may be the best
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[LocalCheckpoints()],
        callbacks=[LossLog(), best, StageProof(), resume],
    )
    left = find_resume(folder)
    trainer.fit(task, datamodule=data, ckpt_path=None if left is None else str(left), weights_only=True)
    return best, resume


def _batch_size(given: int | None, train: str, images: int) -> int:
    if given is None:
        return max(2, min(LARGEST_BATCH[train], images // 4))
    return arguments.integer(given, "batch_size", least=2, most=images)
