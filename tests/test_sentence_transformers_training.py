"""sentence-transformers trains an exported checkpoint by every loss that takes pictures or texts, and evaluates it with pictures."""

import copy
import gc
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from toy import toy_model, toy_processor
from toyqwen import toy_qwen

from tests.test_published import saved
from unimodal import Unimodal
from unimodal.adapters import export_cross_encoder, export_sentence_transformer
from unimodal.data import Scenes
from unimodal.search import Calibration

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pair_losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
evaluators = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
pair_evaluators = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")

COUNT = 4
TEXTS = ["a red circle", "a small blue square", "a star left of a circle", "a green triangle"]
OTHERS = ["a blue star", "circle", "a large yellow square", "a red star above a square"]
SCENES = Scenes("test", count=2 * COUNT)
PICTURES = [SCENES.image(i) for i in range(2 * COUNT)]


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    """The trainer collects garbage at its end, which takes longer than the training where all libraries' objects are looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of each kind of model."""
    root = tmp_path_factory.mktemp("exports")
    bridged = Unimodal(toy_model(), toy_processor())
    bridged.encoder.calibration = Calibration(0.5, -0.25, 2, 1, 0.1, 0.0, ((0.5, 1.0),), bridged.encoder.fingerprint())
    bridged.save_pretrained(root / "bridged")
    folders = {
        "bridged": export_sentence_transformer(root / "bridged", root / "embedder"),
        "pairs": export_cross_encoder(root / "bridged", root / "reranker"),
    }
    for name in ("clip", "naflex"):
        saved(name, root / f"published-{name}")
        Unimodal.from_pretrained(root / f"published-{name}").save_pretrained(root / name)
        folders[name] = export_sentence_transformer(root / name, root / f"{name}-embedder")
    for name, kind, export in (
        ("qwen", "embedder", export_sentence_transformer),
        ("qwen pairs", "reranker", export_cross_encoder),
    ):
        toy_qwen(root / f"published-{name}", kind)
        Unimodal.from_pretrained(root / f"published-{name}").save_pretrained(root / name)
        folders[name] = export(root / name, root / f"exported-{name}")
    return folders


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        name: (st.CrossEncoder if "pairs" in name else st.SentenceTransformer)(
            str(folder), device="cpu", trust_remote_code=True
        )
        for name, folder in folders.items()
    }


@pytest.fixture
def fresh(loaded: dict[str, Any]) -> Callable[[str], Any]:
    return lambda name: copy.deepcopy(loaded[name])


def columns(kind: str, size: int) -> dict[str, list[Any]]:
    """Columns of one kind of item, or of pictures and texts in turn."""
    of = {"pictures": [PICTURES[:COUNT], PICTURES[COUNT:]], "texts": [TEXTS, OTHERS]}
    of["both"] = [PICTURES[:COUNT], TEXTS]
    of["items"] = [
        [{"image": picture, "text": text} for picture, text in zip(PICTURES, some)] for some in (TEXTS, OTHERS)
    ]
    first, second = of[kind]
    return dict(zip(("anchor", "positive", "negative"), (first, second, second[::-1])[:size]))


def train(
    trainer_class: Any, arguments_class: Any, model: Any, loss: nn.Module, data: dict[str, Any], folder: Path
) -> tuple[Any, list[float]]:
    """Three steps of the trainer; it and the loss of each step."""
    arguments = arguments_class(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=COUNT,
        learning_rate=1e-2,
        logging_steps=1,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = trainer_class(model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(data), loss=loss)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_embedder(model: Any, loss: nn.Module, data: dict[str, Any], folder: Path) -> tuple[Any, list[float]]:
    classes = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    return train(*classes, model, loss, data, folder)


def train_pairs(model: Any, loss: nn.Module, data: dict[str, Any], folder: Path) -> tuple[Any, list[float]]:
    classes = st.CrossEncoderTrainer, st.CrossEncoderTrainingArguments
    return train(*classes, model, loss, data, folder)


def names_of(package: Any, kind: type) -> set[str]:
    """The classes of a kind that a package offers."""
    offered = {name: getattr(package, name) for name in package.__all__}
    return {name for name, one in offered.items() if isinstance(one, type) and issubclass(one, kind)}


def changed(model: Any, before: Any) -> set[str]:
    weights = dict(before.named_parameters())
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, weights[name])}


# Losses of embeddings: how many columns each reads, its labels, and its own arguments.

CLASSES, SCORES = [0, 0, 1, 1], [0.9, 0.1, 0.6, 0.3]
BINARY, TEACHER = [1, 0, 1, 0], np.random.default_rng(0).normal(size=(COUNT, 16)).tolist()
LOSSES: dict[str, tuple[int, Any, Callable[[Any], dict[str, Any]]]] = {
    "AnglELoss": (2, SCORES, lambda model: {}),
    "BatchAllTripletLoss": (1, CLASSES, lambda model: {}),
    "BatchHardSoftMarginTripletLoss": (1, CLASSES, lambda model: {}),
    "BatchHardTripletLoss": (1, CLASSES, lambda model: {}),
    "BatchSemiHardTripletLoss": (1, CLASSES, lambda model: {}),
    "CachedGISTEmbedLoss": (3, None, lambda model: {"guide": copy.deepcopy(model), "mini_batch_size": 3}),
    "CachedMultipleNegativesRankingLoss": (3, None, lambda model: {"mini_batch_size": 3}),
    "CachedMultipleNegativesSymmetricRankingLoss": (2, None, lambda model: {"mini_batch_size": 3}),
    "CoSENTLoss": (2, SCORES, lambda model: {}),
    "ContrastiveLoss": (2, BINARY, lambda model: {}),
    "CosineSimilarityLoss": (2, SCORES, lambda model: {}),
    "ContrastiveTensionLoss": (2, [1.0, 0.0, 1.0, 0.0], lambda model: {}),
    "ContrastiveTensionLossInBatchNegatives": (2, None, lambda model: {}),
    "DistillKLDivLoss": (3, [[0.9, 0.1]] * COUNT, lambda model: {}),
    "EmbedDistillLoss": (2, TEACHER, lambda model: {"projection_dim": 16}),
    "GISTEmbedLoss": (3, None, lambda model: {"guide": copy.deepcopy(model)}),
    "GlobalOrthogonalRegularizationLoss": (2, None, lambda model: {}),
    "MSELoss": (2, TEACHER, lambda model: {"projection_dim": 16}),
    "MarginMSELoss": (3, SCORES, lambda model: {}),
    "MatryoshkaLoss": (
        3,
        None,
        lambda model: {"loss": losses.MultipleNegativesRankingLoss(model), "matryoshka_dims": [16, 8]},
    ),
    "MegaBatchMarginLoss": (
        2,
        None,
        lambda model: {"positive_margin": 1.0, "negative_margin": 0, "mini_batch_size": 3},
    ),
    "MultipleNegativesRankingLoss": (3, None, lambda model: {}),
    "MultipleNegativesSymmetricRankingLoss": (2, None, lambda model: {}),
    "OnlineContrastiveLoss": (2, [1, 1, 1, 1], lambda model: {}),
    "SoftmaxLoss": (
        2,
        CLASSES,
        lambda model: {"embedding_dimension": model.get_embedding_dimension(), "num_labels": 2},
    ),
    "TripletLoss": (3, None, lambda model: {}),
}
# These reach into the layers of a transformers text model, or write its words.
OF_TEXT_MODELS = {"AdaptiveLayerLoss", "Matryoshka2dLoss", "DenoisingAutoEncoderLoss"}


def test_every_loss_of_embeddings_is_listed() -> None:
    assert names_of(losses, nn.Module) == {*LOSSES, *OF_TEXT_MODELS}


# What only reads the second column with the model that is kept, or one column alone.
ONE_SIDE = {name for name, (size, *_) in LOSSES.items() if size == 1 or name.startswith("ContrastiveTension")}


@pytest.mark.parametrize("model_name", ["bridged", "clip", "naflex"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_embeddings_trains_every_export_with_pictures(
    name: str, model_name: str, fresh: Any, tmp_path: Path
) -> None:
    """Pictures alone, and with the published pairs pictures and texts: they have a tower each."""
    kind = "pictures" if model_name == "bridged" else "both"
    trained = check_loss(model_name, name, kind, fresh, tmp_path)
    sides = {"vision"} if kind == "pictures" else {"vision", "text"}
    assert name in ONE_SIDE or {side for side in sides if any(f".{side}" in part for part in trained)} == sides


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_embeddings_trains_with_texts(name: str, fresh: Any, tmp_path: Path) -> None:
    assert any(".text." in part for part in check_loss("bridged", name, "texts", fresh, tmp_path))


def check_loss(model_name: str, name: str, kind: str, fresh: Any, folder: Path) -> set[str]:
    """Train three steps; the names of the weights that changed."""
    model, (size, labels, options) = fresh(model_name), LOSSES[name]
    before = copy.deepcopy(model)
    loss = getattr(losses, name)(**{"model": model, **options(model)})
    data = columns(kind, size) | ({} if labels is None else {"label": labels})
    _, steps = train_embedder(model, loss, data, folder)
    assert len(steps) == 3 and all(map(math.isfinite, map(float, steps))) and len(set(steps)) > 1, steps
    trained = changed(model, before)
    assert trained
    return trained


def test_paths_and_items_of_both_kinds_train(fresh: Any, tmp_path: Path) -> None:
    """Paths of pictures are pictures, and an item may have a picture and a text, or in one column now this and now that."""
    paths = []
    for i, picture in enumerate(PICTURES[:COUNT]):
        picture.save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    for data in ({"picture": paths, "caption": TEXTS}, columns("items", 3)):
        model = fresh("bridged")
        _, steps = train_embedder(model, losses.MultipleNegativesRankingLoss(model), data, tmp_path / "run")
        assert len(set(steps)) == 3
    model = fresh("bridged")
    mixed = model[0].preprocess([{"image": PICTURES[0]}, {"text": TEXTS[1]}, {"image": PICTURES[2], "text": TEXTS[2]}])
    assert {len(part) for part in mixed.values()} == {3}
    expected = [model.encode(item) for item in (PICTURES[0], TEXTS[1], {"image": PICTURES[2], "text": TEXTS[2]})]
    assert model(mixed)["sentence_embedding"].detach().numpy() == pytest.approx(np.stack(expected), abs=1e-6)


@pytest.mark.parametrize("kind", ["texts", "pictures", "items"])
@pytest.mark.parametrize("model_name", ["bridged", "clip", "naflex", "qwen"])
def test_cached_losses_have_the_gradients_of_the_plain_one(model_name: str, kind: str, fresh: Any) -> None:
    """They cut the features into pieces by rows, which must stay the same items."""
    gradients = []
    for name, options in (("", {}), ("Cached", {"mini_batch_size": 3}), ("Cached", {"mini_batch_size": 1})):
        model = fresh(model_name).eval()
        loss = getattr(losses, f"{name}MultipleNegativesRankingLoss")(model, **options)
        loss([model.preprocess(column) for column in columns(kind, 3).values()], None).backward()
        gradients.append([part.grad for part in model.parameters() if part.grad is not None])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], atol=1e-5, rtol=1e-4)


def test_a_trained_model_is_saved_and_loaded(fresh: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("bridged", "clip", "naflex"):
        model, folder = fresh(name), tmp_path / name
        trainer, _ = train_embedder(model, losses.MultipleNegativesRankingLoss(model), columns("both", 2), folder)
        trainer.save_model(str(folder / "saved"))
        again = st.SentenceTransformer(str(folder / "saved"), device="cpu", trust_remote_code=True)
        for items in (PICTURES, TEXTS):
            assert again.encode(items) == pytest.approx(model.encode(items), abs=1e-6)
        assert "generated_from_trainer" in (folder / "saved" / "README.md").read_text()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# Losses of pairs.

RANKED = [[2.0, 0.0, 1.0, 3.0]] * COUNT
PAIR_LOSSES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ADRMSELoss": ("lists", RANKED, {"mini_batch_size": 3}),
    "BinaryCrossEntropyLoss": ("pairs", BINARY, {}),
    "CachedMultipleNegativesRankingLoss": ("triplets", None, {"mini_batch_size": 3}),
    "LambdaLoss": ("lists", RANKED, {}),
    "ListMLELoss": ("lists", RANKED, {}),
    "ListNetLoss": ("lists", RANKED, {}),
    "MSELoss": ("pairs", SCORES, {}),
    "MarginMSELoss": ("triplets", SCORES, {}),
    "MultipleNegativesRankingLoss": ("triplets", None, {}),
    "PListMLELoss": ("lists", RANKED, {}),
    "RankNetLoss": ("lists", RANKED, {}),
}
OF_CLASSES = {"CrossEntropyLoss"}  # for models of several classes; a matching head has one
PARTS = {
    "PListMLELambdaWeight",
    "NoWeightingScheme",
    "NDCGLoss1Scheme",
    "NDCGLoss2Scheme",
    "LambdaRankScheme",
    "NDCGLoss2PPScheme",
}


def pair_columns(kind: str, turned: bool) -> dict[str, list[Any]]:
    """Texts and their pictures, or turned round, as each loss of pairs reads them."""
    one, two, three = (PICTURES[:COUNT], TEXTS, OTHERS) if turned else (TEXTS, PICTURES[:COUNT], PICTURES[COUNT:])
    if kind == "lists":
        return {"query": one, "documents": [two] * COUNT}
    return {"query": one, "positive": two} | ({"negative": three} if kind == "triplets" else {})


def test_every_loss_of_pairs_is_listed() -> None:
    assert names_of(pair_losses, nn.Module) == {*PAIR_LOSSES, *OF_CLASSES, *PARTS}


@pytest.mark.filterwarnings("ignore:training lets go of the calibration")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_of_pairs_trains(name: str, turned: bool, fresh: Any, tmp_path: Path) -> None:
    model, (kind, labels, options) = fresh("pairs"), PAIR_LOSSES[name]
    before, loss = copy.deepcopy(model), getattr(pair_losses, name)(model, **options)
    data = pair_columns(kind, turned) | ({} if labels is None else {"label": labels})
    _, steps = train_pairs(model, loss, data, tmp_path)
    assert len(steps) == 3 and all(map(math.isfinite, map(float, steps))) and len(set(steps)) > 1, steps
    trained = changed(model, before)
    assert all(any(part in name for name in trained) for part in (".vision.", ".text.", ".bridge.", ".matching."))


def test_conversations_of_pairs_train(fresh: Any, tmp_path: Path) -> None:
    model, before = fresh("qwen pairs"), fresh("qwen pairs")
    loss = pair_losses.CachedMultipleNegativesRankingLoss(model, num_negatives=1, mini_batch_size=3)
    _, steps = train_pairs(model, loss, {"query": TEXTS, "positive": PICTURES[:COUNT]}, tmp_path)
    assert len(set(steps)) == 3 and any(".visual." in name for name in changed(model, before))


def test_a_trained_cross_encoder_is_saved_and_loaded_without_its_calibration(
    fresh: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A calibration belongs to the weights that it was measured on."""
    model, data = fresh("pairs"), pair_columns("pairs", False) | {"label": BINARY}
    with pytest.warns(UserWarning, match="training lets go of the calibration"):
        trainer, _ = train_pairs(model, pair_losses.BinaryCrossEntropyLoss(model), data, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    again = st.CrossEncoder(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    pairs = list(zip(TEXTS, PICTURES))
    assert again.predict(pairs) == pytest.approx(model.predict(pairs), abs=1e-6)
    assert not (tmp_path / "saved" / "calibration.json").exists()
    assert "generated_from_trainer" in (tmp_path / "saved" / "README.md").read_text()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_single_items_have_no_score(loaded: dict[str, Any]) -> None:
    """sentence-transformers counts the tokens of a column for its card."""
    features = loaded["pairs"].preprocess(TEXTS, task="document")
    assert features["attention_mask"].sum(dim=1).tolist() == [5, 6, 8, 5]
    with pytest.raises(ValueError, match="got single items, expected pairs of an image and a text"):
        loaded["pairs"](features)


# Evaluators.

EVALUATORS: dict[str, Callable[[list[Any], list[Any]], dict[str, Any]]] = {
    "BinaryClassificationEvaluator": lambda a, b: {"sentences1": a, "sentences2": b, "labels": BINARY},
    "EmbeddingSimilarityEvaluator": lambda a, b: {"sentences1": a, "sentences2": b, "scores": SCORES},
    "InformationRetrievalEvaluator": lambda a, b: {
        "queries": dict(zip("abcd", a)),
        "corpus": dict(zip("wxyz", b)),
        "relevant_docs": {"a": {"w"}, "b": {"x", "y"}, "c": {"y"}, "d": {"z"}},
    },
    "MSEEvaluator": lambda a, b: {"source_sentences": a, "target_sentences": b},
    "ParaphraseMiningEvaluator": lambda a, b: {
        "sentences_map": dict(zip("abcd", a)),
        "duplicates_list": [("a", "b"), ("c", "d")],
    },
    "RerankingEvaluator": lambda a, b: {
        "samples": [{"query": query, "positive": b[:2], "negative": b[2:]} for query in a]
    },
    "TranslationEvaluator": lambda a, b: {"source_sentences": a, "target_sentences": b},
    "TripletEvaluator": lambda a, b: {"anchors": a, "positives": b, "negatives": b[::-1]},
}
OTHER_EVALUATORS = {
    "BaseEvaluator",
    "SentenceEvaluator",  # what evaluators are made from
    "SequentialEvaluator",  # these three have a test below
    "LabelAccuracyEvaluator",
    "MSEEvaluatorFromDataFrame",
    "NanoBEIREvaluator",  # data sets of texts on the Hub
}
PAIR_EVALUATORS: dict[str, Callable[[], dict[str, Any]]] = {
    "CrossEncoderClassificationEvaluator": lambda: {"sentence_pairs": list(zip(TEXTS, PICTURES)), "labels": BINARY},
    "CrossEncoderCorrelationEvaluator": lambda: {"sentence_pairs": list(zip(PICTURES, TEXTS)), "scores": SCORES},
    "CrossEncoderRerankingEvaluator": lambda: {
        "samples": [{"query": query, "positive": PICTURES[:1], "negative": PICTURES[1:3]} for query in TEXTS]
    },
}


def test_every_evaluator_is_listed() -> None:
    assert names_of(evaluators, evaluators.BaseEvaluator) == {*EVALUATORS, *OTHER_EVALUATORS}
    current = {name for name in names_of(pair_evaluators, evaluators.BaseEvaluator) if name.startswith("Cross")}
    assert current == {*PAIR_EVALUATORS, "CrossEncoderNanoBEIREvaluator"}


@pytest.mark.parametrize("model_name", ["bridged", "clip", "naflex"])
@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_runs_with_pictures(name: str, model_name: str, loaded: dict[str, Any], tmp_path: Path) -> None:
    model = loaded[model_name]
    makes, of_one_kind = getattr(evaluators, name), name in ("ParaphraseMiningEvaluator", "MSEEvaluator")
    given = EVALUATORS[name](PICTURES[:COUNT], PICTURES[COUNT:] if of_one_kind else TEXTS)
    if "teacher_model" in inspect.signature(makes).parameters:
        given["teacher_model"] = model
    measured = makes(**given)(model, output_path=str(tmp_path))
    assert measured and all(math.isfinite(value) for value in measured.values()), measured


def test_evaluators_of_texts_run(loaded: dict[str, Any], tmp_path: Path) -> None:
    model = loaded["bridged"]
    triplets = evaluators.TripletEvaluator(anchors=TEXTS, positives=OTHERS, negatives=OTHERS[::-1])
    translated = [{"en": text, "de": other} for text, other in zip(TEXTS, OTHERS)]
    examples = [st.InputExample(texts=[text, other], label=i % 2) for i, (text, other) in enumerate(zip(TEXTS, OTHERS))]
    softmax = losses.SoftmaxLoss(model, embedding_dimension=16, num_labels=2)
    for evaluator in (
        evaluators.SequentialEvaluator([triplets, triplets]),
        evaluators.MSEEvaluatorFromDataFrame(translated, teacher_model=model, combinations=[("en", "de")]),
        evaluators.LabelAccuracyEvaluator(DataLoader(examples, batch_size=2), softmax_model=softmax),
    ):
        measured = evaluator(model, output_path=str(tmp_path))
        assert measured and all(math.isfinite(value) for value in measured.values())


@pytest.mark.parametrize("name", PAIR_EVALUATORS)
def test_every_evaluator_of_pairs_runs_with_pictures(name: str, loaded: dict[str, Any], tmp_path: Path) -> None:
    measured = getattr(pair_evaluators, name)(**PAIR_EVALUATORS[name]())(loaded["pairs"], output_path=str(tmp_path))
    assert measured and all(math.isfinite(value) for value in measured.values()), measured


def test_an_evaluator_chooses_the_best_step(fresh: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fresh("bridged")
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data = datasets.Dataset.from_dict(columns("both", 2))
    evaluator = evaluators.InformationRetrievalEvaluator(**EVALUATORS["InformationRetrievalEvaluator"](TEXTS, PICTURES))
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = st.SentenceTransformerTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, loss=loss, evaluator=evaluator
    )
    trainer.train()
    assert [entry["eval_cosine_ndcg@10"] for entry in trainer.state.log_history if "eval_cosine_ndcg@10" in entry]
    again = st.SentenceTransformer(str(tmp_path / "checkpoint-2"), device="cpu", trust_remote_code=True)
    assert again.encode(TEXTS).shape == (COUNT, 16)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
