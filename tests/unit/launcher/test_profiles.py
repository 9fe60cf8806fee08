from pathlib import Path

import pytest

import launcher.profiles
from launcher.profiles import find_profile
from trainer.spec import JobError

BUILT_IN = sorted(path.stem for path in Path(launcher.profiles.__file__).parent.glob("*.yaml"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def own(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_built_in_profiles_are_these() -> None:
    assert BUILT_IN == ["a100", "a100-40", "cpu", "rtx4090", "t4x4"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_profile_says_where_its_nodes_are_and_dates_its_prices(name: str) -> None:
    profile = find_profile(name)
    assert profile.name == name
    assert all(price.as_of and price.source for price in profile.prices)
    assert bool(profile.nodes) == bool(profile.gpu) == bool(profile.tflops)


def test_the_jobs_own_profile_comes_before_the_users_and_that_before_the_built_in(tmp_path: Path, home: Path) -> None:
    mine = "gpu: T4\ngpus: 1\ngpu_gib: 14\ncores: {cores}\nram_gib: 16\ndisk_gib: 50\n"
    assert find_profile("t4x4", tmp_path).cores == 44
    own(home / ".config" / "utaforge" / "profiles", "t4x4", mine.format(cores=3))
    assert find_profile("t4x4", tmp_path).cores == 3
    own(tmp_path / "profiles", "t4x4", mine.format(cores=2))
    assert find_profile("t4x4", tmp_path).cores == 2


def test_every_fault_of_a_profile_is_told_with_its_place(tmp_path: Path) -> None:
    path = own(
        tmp_path / "profiles",
        "箱",
        "cores: many\nram_gb: 16\ndisk_gib: 50\n"
        "prices: [{machine: 私の箱, usd_per_hour: -1, as_of: '2026', source: 私}]\n",
    )
    path.rename(path.with_stem("box"))
    with pytest.raises(JobError) as caught:
        find_profile("box", tmp_path)
    lines = caught.value.problem.splitlines()
    assert [line.removeprefix(str(path.with_stem("box"))).split(": ")[:2] for line in lines] == [
        [":1:1", "ram_gib"],
        [":1:8", "cores"],
        [":2:1", "ram_gb"],
        [":4:39", "prices.0.usd_per_hour"],
    ]
    assert "ram_gib" in lines[2]


def test_an_unknown_profile_is_told_with_the_nearest_one_and_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        find_profile("t4x5", tmp_path)
    assert str(tmp_path / "profiles") in caught.value.problem
    assert "/.config/utaforge/profiles" in caught.value.problem
    assert caught.value.cure == "did you mean t4x4? there are: a100, a100-40, cpu, rtx4090, t4x4"
