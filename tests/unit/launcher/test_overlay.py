import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from launcher.overlay import Overlay
from trainer.spec import JobError


def checkout(folder: Path, text: str) -> str:
    (folder / "trainer" / "__pycache__").mkdir(parents=True, exist_ok=True)
    (folder / "trainer" / "__init__.py").write_text(text, encoding="utf-8")
    (folder / "trainer" / "__pycache__" / "x.pyc").write_bytes(b"x")
    return str(folder)


def test_code_is_named_by_what_it_is_and_holds_the_trainer_alone(tmp_path: Path) -> None:
    first = Overlay(checkout(tmp_path, '"""歌"""'), "s3://music/店")
    assert first.url == Overlay(checkout(tmp_path, '"""歌"""'), "s3://music/店").url
    assert zipfile.ZipFile(BytesIO(first._archive)).namelist() == ["code/trainer/__init__.py"]
    assert Overlay(checkout(tmp_path, '"""唄"""'), "s3://music/店").url != first.url
    assert first.url.startswith("s3://music/店/code/")


def test_what_is_no_checkout_and_a_store_that_ray_cannot_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no package trainer"):
        Overlay(str(tmp_path), "s3://music")
    with pytest.raises(JobError, match="s3:// only"):
        Overlay(checkout(tmp_path, ""), "gs://music")
