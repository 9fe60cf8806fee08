"""The journal is read while a rank writes it: a line is read whole or later."""

import io

from trainer.tracking import whole_lines

FIRST, SECOND = '{"歌": 1}\n'.encode(), '{"歌": 2}\n'.encode()


class Growing(io.RawIOBase):
    """A file whose second line is written in two parts; the rest is there a moment later."""

    def __init__(self) -> None:
        self._parts = [FIRST + SECOND[:5], b"", SECOND[5:], b""]
        self._content, self._place = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET or offset == 0
        self._place = offset if whence == io.SEEK_SET else self._place
        return self._place

    def readinto(self, buffer: memoryview) -> int:
        if self._place == len(self._content) and self._parts:
            self._content += self._parts.pop(0)
        read = self._content[self._place : self._place + len(buffer)]
        buffer[: len(read)] = read
        self._place += len(read)
        return len(read)


def test_a_line_that_is_still_being_written_is_read_once_it_is_whole() -> None:
    file = io.BufferedReader(Growing())
    assert whole_lines(file, 0, 200) == [FIRST]
    assert whole_lines(file, len(FIRST), 200) == [SECOND]
    assert whole_lines(file, len(FIRST + SECOND), 200) == []


def test_no_more_lines_are_read_than_asked_for() -> None:
    file = io.BytesIO(FIRST + SECOND)
    assert whole_lines(file, 0, 1) == [FIRST]
    assert whole_lines(file, len(FIRST), 1) == [SECOND]
