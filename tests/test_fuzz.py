"""Five thousand random calls of the public interface: each gives a sane result, or an error that says what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import fuzzing
import pytest

SEED = 17
CALLS = {"of_model": 1500, "of_search": 1000, "of_files": 60, "of_readers": 800, "of_metrics": 1640}


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.Doors]:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # what a call writes under a name from the pool stays here
        yield fuzzing.Doors(folder)


@pytest.mark.parametrize(("group", "count"), CALLS.items(), ids=CALLS)
def test_whatever_comes_gives_a_result_or_a_clear_error(doors: fuzzing.Doors, group: str, count: int) -> None:
    chosen = getattr(doors, group)()
    complaints, ends = fuzzing.fuzz(chosen, SEED, count)
    assert not complaints, "\n".join(complaints)
    assert sum(ends.values()) == count
    for name in chosen:
        assert ends[name, "refused"], f"no call of {name} was wrong"


def test_complaints_tell_foreign_errors_from_ours(doors: fuzzing.Doors, tmp_path: Path) -> None:
    def said(call: object, **values: object) -> str:
        return next(iter(fuzzing.fuzz({"door": fuzzing.Door(call, {}, **values)}, 0, 1)[0]), "")  # type: ignore[arg-type]

    assert "KeyError" in said(lambda: {}["a"])
    assert "not supported between" in said(lambda: 1 < "a")  # type: ignore[operator]
    assert "not finite" in said(lambda: fuzzing.np.array([fuzzing.NAN]), sane=fuzzing._finite)
    assert not said(lambda: doors.model.encode(3))
