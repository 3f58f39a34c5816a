"""Stop strings and streamed text."""

import pytest

from tunejax.generate import stop


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is special."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


def pieces(text, **options):
    stream = stop.TextStream(Bytes(), **options)
    out = [stream.push(t) for t in text.encode()]
    return out, stream


def test_cut_takes_the_first_of_several():
    assert stop.cut("one two three", ["three", "two"]) == ("one ", True)
    assert stop.cut("one", ["two", ""]) == ("one", False)


@pytest.mark.parametrize(("text", "expected"), [("abc", 0), ("abcEN", 2), ("abcE", 1), ("END", 0), ("", 0)])
def test_held_back(text, expected):
    assert stop.held_back(text, ["END!", "x"]) == (3 if text == "END" else expected)


def test_characters_are_shown_whole():
    out, stream = pieces("aé☃b")
    assert out == ["a", "", "é", "", "", "☃", "b"]
    assert stream.finish() == ""


def test_a_stop_string_is_never_shown_not_even_its_start():
    out, stream = pieces("say stand STOP more", stop_strings=["STOP"])
    assert "".join(out) == "say stand "
    assert stream.stopped
    assert stream.push(ord("x")) == ""


def test_what_was_held_back_comes_out_at_the_end():
    out, stream = pieces("a ST", stop_strings=["STOP"])
    assert "".join(out) == "a "
    assert stream.finish() == "ST"


def test_a_stop_token_ends_the_row():
    stream = stop.TextStream(Bytes(), stop_tokens=[7], stop_strings=["zz"])
    assert [stream.push(t) for t in (97, 122, 7, 98)] == ["a", "", "z", ""]
