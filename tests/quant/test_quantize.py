import threading
import time

import pytest
import torch

from hf_ext.quant.quantize import each_on_a_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_answer_comes_in_its_place_from_a_thread_that_uses_one(two_threads):
    together = threading.Barrier(2, timeout=30)

    def work(name):
        if name in "ab":
            together.wait()  # nobody passes alone
        return name.upper(), torch.get_num_threads(), threading.get_ident()

    found = list(each_on_a_thread(work, list("abcde")))
    assert [name for name, _, _ in found] == list("ABCDE")
    assert {threads for _, threads, _ in found} == {1}
    assert len({ident for _, _, ident in found}) == 2
    assert torch.get_num_threads() == 2


def test_the_first_failure_is_raised_and_nothing_new_is_begun(two_threads):
    begun = []

    def work(name):
        begun.append(name)
        time.sleep(0.05)
        if name == "a":
            raise ValueError("a cannot be solved")

    with pytest.raises(ValueError, match="a cannot be solved"):
        list(each_on_a_thread(work, list("abcdefgh")))
    assert len(begun) < 8
    assert torch.get_num_threads() == 2


def test_one_thread_needs_no_other():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert list(each_on_a_thread(lambda name: threading.get_ident(), ["a", "b"])) == [threading.get_ident()] * 2
    finally:
        torch.set_num_threads(before)
