"""The contract of `Patch`: apply, apply twice, remove, remove twice, an exception inside ``with``."""

import pytest
import torch
from torch import nn

from hf_ext.patches.patch import Patch


class Host:
    shared = "class"

    def __init__(self):
        self.own = "instance"

    def speak(self):
        return "host"


def snapshot(owner):
    return dict(vars(owner))


def test_set_and_remove_an_instance_attribute():
    host, patch = Host(), Patch("test")
    before = snapshot(host)
    patch.set(host, "own", "patched")
    assert host.own == "patched"
    patch.remove()
    assert snapshot(host) == before


def test_an_inherited_attribute_is_removed_not_copied():
    host, patch = Host(), Patch("test")
    patch.set(host, "shared", "patched")
    patch.set(host, "speak", lambda: "patched")
    assert (host.shared, host.speak()) == ("patched", "patched")
    patch.remove()
    assert set(vars(host)) == {"own"}
    assert (host.shared, host.speak()) == ("class", "host")


def test_class_attributes_come_back():
    before = dict(vars(Host))
    with Patch("test") as patch:
        patch.set(Host, "speak", lambda self: "patched")
        patch.add(Host, "new", 1)
        assert Host().speak() == "patched" and Host.new == 1
    assert dict(vars(Host)) == before


def test_set_twice_in_one_patch_restores_the_first_value():
    host = Host()
    with Patch("test") as patch:
        patch.set(host, "own", "one")
        patch.set(host, "own", "two")
        assert host.own == "two"
    assert host.own == "instance"


def test_nested_patches_of_one_attribute_come_off_in_reverse_order():
    host, first, second = Host(), Patch("first"), Patch("second")
    first.set(host, "own", "one")
    second.set(host, "own", "two")
    second.remove()
    assert host.own == "one"
    first.remove()
    assert host.own == "instance"


def test_removing_below_another_patch_is_refused_and_changes_nothing():
    host, first, second = Host(), Patch("first"), Patch("second")
    first.set(host, "own", "one")
    second.set(host, "own", "two")
    with pytest.raises(RuntimeError, match="changed again after this patch"):
        first.remove()
    assert host.own == "two"
    second.remove()
    first.remove()
    assert host.own == "instance"


def test_remove_twice_is_harmless():
    host, patch = Host(), Patch("test")
    patch.set(host, "own", "patched")
    patch.remove()
    host.own = "changed since"
    patch.remove()
    assert host.own == "changed since"


def test_an_exception_inside_with_restores_everything():
    layer, host, table = nn.Linear(2, 2), Host(), {"a": 1}
    x = torch.ones(1, 2)
    expected, before = layer(x), snapshot(host)
    with pytest.raises(ZeroDivisionError), Patch("test") as patch:
        patch.hook(layer.register_forward_hook, lambda module, args, output: output + 1)
        patch.set(layer, "forward", lambda x: x)
        patch.set(host, "own", None)
        patch.set_item(table, "a", 2)
        patch.set_item(table, "b", 3)
        assert torch.equal(layer(x), x + 1)
        _ = 1 / 0
    assert torch.equal(layer(x), expected)
    assert "forward" not in vars(layer) and not layer._forward_hooks
    assert snapshot(host) == before and table == {"a": 1}


def test_callbacks_run_once_in_reverse():
    calls, patch = [], Patch("test")
    patch.on_remove(calls.append, "first")
    patch.on_remove(calls.append, "second")
    patch.remove()
    patch.remove()
    assert calls == ["second", "first"]


def test_a_missing_attribute_names_patch_and_owner():
    with pytest.raises(AttributeError, match="my patch: Host has no attribute 'gone'"):
        Patch("my patch").set(Host(), "gone", 1)


def test_adding_what_exists_is_refused():
    with pytest.raises(AttributeError, match="Host already has an attribute 'own'"):
        Patch("my patch").add(Host(), "own", 1)


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_parameters_are_not_replaced(attribute):
    with pytest.raises(TypeError, match="is a parameter, buffer or submodule of Linear"):
        Patch("my patch").set(nn.Linear(2, 2), attribute, None)
