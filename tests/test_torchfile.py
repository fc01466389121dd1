"""The reader of PyTorch files: what real ones hold, and that a hostile one runs nothing, reads nothing else, costs nothing."""

from __future__ import annotations

import base64
import builtins
import io
import os
import pickle
import re
import struct
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from features.errors import WeightsError
from features.networks.tensors import assign_from_file, container_of
from features.networks.torchfile import LEGACY_MAGIC, torch_tensors

# torch.save of PyTorch 2.13 wrote both, of the state dict of a Linear (its weight transposed, its bias in float16) and a
# BatchNorm1d; the first with _use_new_zipfile_serialization=False
REAL = {
    "legacy": (
        "c-nQ7*>2N76ozeQqlPYQg|fBm4oh&H#7SA&0;M3C)!fVtvK(g`8(cfb9v6WWDL1WvXW)WMo`Uz`5s<jxcxj-;9eFIznVIkZ$LGvQ_#(Q$zpnjS"
        "c>De3Tx}#g`&q#E5IBj<a2z)XeCAueYi!aWbbJqZTtFsq#&sBTsX@J-V|pNbA|eLahXFN0=OYcFFodE+N*D}nKVVSO1X93}<1r{}MN*6zzSoC}"
        "R*WLlv{1&S7DJU#d=d0$Kzpl>#YEt$I`9&iz#Z#W?LBq+HUq(8eqh-(BVvvlibg=Yk>mCZM!nDvj7>#^f+UejYyel9eG0{Ni@4_cCVQO*MJSOe"
        "T(j6z+pUILZ_6FEDMLB&Y7HW^SANdmz$=Z@1g)?Q6B@4x+aP|nV_OFq9MWMjkwI@=#|&Z0MqztL?1|~FkF}<EYbi>jrNE3`(FD{uoM>#p5slx1"
        "qbdIwgX22PCTH(@J7+(UD%g9i%d*;plNoL<!<~w8r&HV+24{6Rm)J#IVt0N&Si7OZLIyjZ!7jwGiz)09gUdQxA=4==h&<2n`o;#udbpYoRT^?j"
        "1u278Gw8J#dOd~SU~p51TC(jQ=%yLKt$mC(+I0owj9Jf^O3ZAe%qD}D4l0>VnO?MEbWLX2G&ERXTJLBN+PiZ06zg)Fv(Da}bz~V9QI1Es+bCD9"
        "rZRUJ+|}V;G=!xjU-&1O*)y35%gOwTL@>(1{UJO^GO%-}9%_6@grtICbqJ5_aiHtL+7KRNKnSC-i?`%Wd^2;h&gW%M$oo@;ym~L@6=o^#<mJ4K"
        "R%k7@o3_z%-2aZ#ws*d~Yc`H?EBIg^VgI%=Uf<z<@Y!eOf7VjG?+?E8CcO"
    ),
    "zip": (
        "c-pO2+i%-c7(cnx$=r5>c4S?F0pqe1x-@aFrCZZ^B_J7zE(pomi{&J4V$HSt*(a?)suYAe35kbILOdcQ{s?%2mx*_TK%0cb140u|JRu?R!Z|)k"
        "dhD*vx?ttRk$rxb^Z9(gcteTB5lSY}p<@cAkZtTPwREg!wr^QAc?R7)bo8Rlrej$~6Pu3hiSM~B!!=s#W)q8m7U~d5tEULrW;3&EnC%XRXcIeb"
        "vy;)f*t9%RbB#vVv|1WAY|nAE9Z7^(I;|!M$RjiLwgGVl5o?yC<M-J`5hm0KnUe)UjgfP6y9)_Lz>vJ5ASJ5AZo?@hqC{_l_-Th4nZz(vhiRXf"
        "xM`TW2d6tksxzQ}N4GYI>}P!T96Z%YC{YYg`>gvgqeS*$mNA~i@Jt<2{`wmBV14HpXNTF7V2%--?-R^Zf@c}Qa~Phl!v)_GA@D7|5P;|5MFxMV"
        "55Gv^FEjWn7+$TzYw8&Wce}Q2+HGyi&~3OBpeaC_(Jb_7UZ*r~Fq%aSm+O#GPX}psbQhKaEJesNmRz4jqAYpFQovBGLrG0B7Q4HpHFVtU7@me*"
        "y?M)MK{-(EcOAPutaim0D8Vujh+ue=2rMix;uQ>6>TtEY2djRi$@;KP_as#P`)g^H?pC<A2eMzu9mDm=UWDsP#8adG(}wjuc&jtK(6FJl2XB)L"
        "QLpPYG8;-F`O~`d@jY^rj*TOGViv9VJ(1aT+$|kzeXW{Yene|L){&#)-~9FKC$s=`94($2i1+(K(=D@YZy7coL%&p@2CBR8C#_8MSOe4Ox^JNI"
        "AvPS^=ry_eq`HH{GBLIc>S6!t@8<=gA{^^MMDj3|ma;W@bxZ?{wO1uyYve;lkBqO@sH1at9^RcJH|9n-${sk%)#Sw!IYJfm9o72&?>{aP0Tdsh"
        "6+h6DYVyE)uSz-Y+z@`IpyUXSwF8cPO}>K0uOHP*B+cJ08Yk2*jIZBYrO%G)|L~bMdqVx<|DZok{Y&HOC%F1=|MJiotv`vXzWy+~R>m=q7pd}("
        "U$#FOogee4!~)D;x@Wj1NwAM}`sSdSt(q)7fst&fvRsswi={%jQk1f#VzFGw777)qv`l{IrCctX%U1Gb>hkLc-`-3UA8FrZgqj`t<nw>(kaPY$"
        "D2(L8dp3YN8$*x!w+IvP;hPE&+#L`cO8hVfAD+_zj+r<LhISarr<@poei27p)`oF>Vg+&O2@aPF<M=KK;y&kbQW(dlOAvRT$K}H~J{5vERp4-i"
        "$M<=k#}&gkz6(Qo2@Y2Z<M<w$4C?i9N9-SdTh9l8^&~o`;WiXOSnSWd5WCF%%?Ho17(4%y97K)ar_R59m+Y-&LSUF_e?FW0AL2u;hy"
    ),
}
HELD = {
    "fc.weight": np.array([[0, 2, 4], [1, 3, 5]], np.float32),
    "fc.bias": np.array([0.5, -1.5], np.float16),
    "bn.weight": np.ones(2, np.float32),
    "bn.bias": np.zeros(2, np.float32),
    "bn.running_mean": np.array([0.25, 2], np.float32),
    "bn.running_var": np.ones(2, np.float32),
    "bn.num_batches_tracked": np.array(7),
}


def real(kind: str) -> bytes:
    return zlib.decompress(base64.b85decode(REAL[kind]))


# ------------------------------------------------------------------------------------ pickles, written by hand
def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return group(*map(number, values))


ORDERED = name("collections", "OrderedDict") + b")R"
FLOATS = name("torch", "FloatStorage")


def storage(key: bytes = text("0"), kind: bytes = FLOATS, count: bytes = number(4)) -> bytes:
    return group(text("storage"), kind, key, text("cpu"), count) + b"Q"


def tensor(
    values: bytes | None = None,
    shape: bytes = numbers(2, 2),
    strides: bytes = numbers(2, 1),
    offset: bytes = number(0),
) -> bytes:
    arguments = (storage() if values is None else values, offset, shape, strides, b"\x89", ORDERED)
    return name("torch._utils", "_rebuild_tensor_v2") + group(*arguments) + b"R"


def state(value: bytes, key: bytes = text("w")) -> bytes:
    """The pickle of an ordered dict with one value."""
    return b"\x80\x02" + ORDERED + b"(" + key + value + b"u."


VALUES = np.arange(4, dtype="<f4").tobytes()


def zipped(description: bytes, values: bytes = VALUES, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("net/data.pkl", description)
        archive.writestr("net/data/0", values)
    return file.getvalue()


def legacy(description: bytes, keys: bytes = b"]" + text("0") + b"a", values: bytes | None = None) -> bytes:
    machine = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    held = number(4)[2:10] + VALUES if values is None else values
    return LEGACY_MAGIC + b".\x80\x02M\xe9\x03." + machine + description + b"\x80\x02" + keys + b"." + held


BOTH = pytest.mark.parametrize("container", [zipped, legacy])


def read(data: bytes) -> dict[str, np.ndarray]:
    return {key: stored[()] for key, stored in torch_tensors(io.BytesIO(data), "net.pth").items()}


# ------------------------------------------------------------------------------------------------- real files
@pytest.mark.parametrize("kind", ["legacy", "zip"])
def test_what_pytorch_writes_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(real(kind))
    assert container_of(tmp_path / "net") == "torch"
    found = read(real(kind))
    assert list(found) == list(HELD)
    for key, values in HELD.items():
        np.testing.assert_array_equal(found[key], values)
        assert found[key].dtype == values.dtype, key


@BOTH
def test_axes_in_any_order_are_put_right_and_may_be_turned_unread(container: Any) -> None:
    data = container(state(tensor(storage(count=number(4)), numbers(2, 1, 2), numbers(1, 7, 2))))
    (stored,) = torch_tensors(io.BytesIO(data), "net.pth").values()
    expected = np.array([[[0, 2]], [[1, 3]]], np.float32)
    np.testing.assert_array_equal(stored[()], expected)
    turned = stored.transposed(2, 0, 1)
    assert turned.shape == (2, 2, 1)
    np.testing.assert_array_equal(turned[()], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["legacy", "zip"])
def test_a_truncated_file_is_damaged_wherever_it_ends(kind: str) -> None:
    whole = real(kind)
    for length in range(20, len(whole) - 1, 41):
        with pytest.raises(WeightsError, match=r"^net.pth (is damaged|holds)"):
            read(whole[:length])


@pytest.mark.slow
def test_flipped_bytes_give_numbers_or_an_error_of_ours() -> None:
    generator = np.random.default_rng(0)
    errors: list[str] = []
    for kind in REAL:
        for _ in range(100):
            data = bytearray(real(kind))
            data[generator.integers(len(data))] ^= 1 << generator.integers(8)
            try:
                assert all(isinstance(values, np.ndarray) for values in read(bytes(data)).values())
            except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
                errors.append(str(error))  # what reads weights makes a WeightsError of it
    assert 20 < len(errors) < 200
    assert max(map(len, errors)) <= 1000


# ---------------------------------------------------------------------------------------------------- attacks
class Runs:
    """What ``pickle`` would call while it reads."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), r"(posix|nt)[. ]system"),
        (builtins.eval, ("open({!r}, 'w')",), r"(__builtin__|builtins)[. ]eval"),
        (builtins.getattr, (os, "system"), r"(__builtin__|builtins)[. ]getattr"),
    ],
)
def test_functions_in_a_pickle_are_named_and_never_run(
    container: Any, protocol: int, function: Any, arguments: Any, named: str, tmp_path: Path
) -> None:
    victim = str(tmp_path / "victim")
    words = tuple(word.format(victim) if isinstance(word, str) else Runs(__import__, "os") for word in arguments)
    with pytest.raises(WeightsError, match=r"net.pth: its pickle (names|holds) ") as caught:
        read(container(pickle.dumps({"w": Runs(function, *words)}, protocol)))
    if protocol > 0:  # the instructions of protocol 0 are refused before a name comes
        assert re.search(rf"names {named}, which is not imported or run", str(caught.value))
    assert not Path(victim).exists()


@BOTH
@pytest.mark.parametrize(
    "description",
    [
        b"(S'touch victim'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch victim'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.",  # STACK_GLOBAL
        b"\x80\x02Pelsewhere\n.",  # PERSID
        b"\x80\x02]2.",  # DUP
    ],
)
def test_other_instructions_are_refused(container: Any, description: bytes) -> None:
    with pytest.raises(
        WeightsError, match=r"net.pth: its pickle (names os.system|holds the instruction (INST|STRING|EXT1|PERSID|DUP))"
    ):
        read(container(description))


def test_no_function_of_pickle_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("an unpickler was made")

    for attribute in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, attribute, refuse)
    monkeypatch.setattr(np, "load", refuse)
    assert list(read(real("zip"))) == list(read(real("legacy"))) == list(HELD)


@BOTH
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(storage(count=number(1 << 50)), numbers(1 << 50), numbers(1)), "damaged: a tensor declares 4503599627370496 bytes of values, the file holds 16"),
        (tensor(storage(count=number(5)), numbers(5), numbers(1)), "damaged: a tensor declares 20 bytes"),
        (tensor(storage(count=number(3)), numbers(3), numbers(1)), "damaged: a tensor declares 12 bytes"),
        (tensor(shape=numbers(1 << 40), strides=numbers(0)), r"a tensor of shape \(1099511627776,\) is not the whole of its 4 stored values"),
        (tensor(shape=numbers(2, 2), strides=numbers(4, 1)), "not the whole of its 4"),  # reaches beyond the end
        (tensor(shape=numbers(2, 2), strides=numbers(1, 1)), "not the whole of its 4"),
        (tensor(shape=numbers(4), strides=numbers(2, 1)), "not the whole of its 4"),
        (tensor(offset=number(1)), "not the whole of its 4"),
        (tensor(offset=number(-1)), "not the whole of its 4"),
        (tensor(offset=b"\x88"), "not the whole of its 4"),  # True
        (tensor(shape=numbers(2, 2), strides=numbers(-2, -1)), "describes a tensor in an unknown way"),
        (tensor(shape=numbers(-2, -2)), "describes a tensor in an unknown way"),
        (tensor(shape=numbers(*[1] * 9), strides=numbers(*[1] * 9)), "describes a tensor in an unknown way"),
        (tensor(shape=numbers(1 << 61), strides=numbers(1)), "describes a tensor in an unknown way"),
        (tensor(tensor()), "describes a tensor in an unknown way"),  # a tensor in the place of a storage
        (tensor(storage(key=storage())), "describes a storage in an unknown way"),
        (tensor(storage(kind=ORDERED)), "describes a storage in an unknown way"),
        (tensor(storage(kind=text("FloatStorage"))), "describes a storage in an unknown way"),
        (tensor(storage(kind=name("torch", "BFloat16Storage"))), "names torch.BFloat16Storage, which is not imported or run"),
        (tensor(storage(key=text("../../etc/passwd"))), "damaged: "),
        (FLOATS + b")R", "makes a tensor or a dict in an unknown way"),
        (FLOATS + b"}b", "treats a value of the type name as a dict"),
        (number(3), "'w' is a value of the type int; expected a state dict"),
        (ORDERED, r"'w' is a value of the type dict; .* save torch.load\(FILE\)\['w'\]"),
        (b"]" + tensor() + b"a", "'w' is a value of the type list"),
        (b"", "damaged: "),
        (b"0" * 9, "damaged: |instruction POP"),
        (b"h\x63", "damaged: "),  # nothing in the memo
        (b"X\xff\xff\xff\xff", "damaged: expected 4294967295 bytes"),
        (b"\x8b\xff\xff\xff\x7f", "damaged: "),
    ],
    ids=range(30),
)  # fmt: skip
def test_what_is_no_dict_of_whole_tensors_is_refused_in_a_sentence(container: Any, value: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read(container(state(value)))
    assert str(caught.value).startswith("net.pth")
    assert len(str(caught.value)) < 500


def test_two_tensors_cannot_describe_one_storage_in_two_ways() -> None:
    two = (
        b"\x80\x02"
        + ORDERED
        + b"("
        + text("a")
        + tensor()
        + text("b")
        + tensor(storage(count=number(2)), numbers(2), numbers(1))
        + b"u."
    )
    with pytest.raises(WeightsError, match="two tensors describe one storage in different ways"):
        read(zipped(two))


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (b"]", None),
        (b"]" + text("0") + b"a" + text("0") + b"a", None),
        (b"]" + text("0") + b"a]a", None),
        (b"}", None),
        (b"]" + text("0") + b"a", b"\xff" * 24),
        (b"]" + text("0") + b"a", number(3)[2:10] + bytes(16)),
        (b"]" + text("0") + b"a", b""),
    ],
)
def test_the_storages_of_an_older_file_are_those_of_its_tensors(keys: bytes, values: bytes | None) -> None:
    with pytest.raises(WeightsError, match=r"net.pth is damaged: "):
        read(legacy(state(tensor()), keys, values))


@pytest.mark.slow
def test_archives_that_expand_or_lie_are_refused() -> None:
    zeros = 1 << 24
    bomb = zipped(state(tensor()), bytes(4 * zeros), zipfile.ZIP_DEFLATED)
    assert len(bomb) < 200_000
    for data in (bomb, zipped(b"\x80\x02" + b"N" * zeros + b"0" * zeros + state(tensor())[2:])):
        with pytest.raises(WeightsError, match=r"is compressed|takes over 16777216 bytes"):
            read(data)
    # the directory of the archive promises 16 bytes of values, of which the archive holds four
    data = zipped(state(tensor()), b"1234")
    place = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    assert data[place + 20 : place + 28] == struct.pack("<II", 4, 4)
    lying = data[: place + 24] + struct.pack("<I", 16) + data[place + 28 :]
    (stored,) = torch_tensors(io.BytesIO(lying), "net.pth").values()
    with pytest.raises((ValueError, zipfile.BadZipFile, EOFError)):
        stored[()]
    two = io.BytesIO()
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a/data.pkl", state(tensor()))
        archive.writestr("b/data.pkl", state(tensor()))
    with pytest.raises(WeightsError, match=r"holds 2 members 'data.pkl'"):
        read(two.getvalue())


def nested() -> bytes:
    """Lists in lists, 25 deep, each of ten times the one below: 10**25 numbers if anything walked through them."""
    level = b"]" + b"q\x00"
    for _ in range(25):
        level += b"]" + b"(" + b"h\x00" * 10 + b"e" + b"q\x00"
    return level


@pytest.mark.parametrize(
    "value",
    [
        nested(),
        nested() + nested() + b"\x93",  # as the two words of a name
        nested() + b"Q",
        tensor(nested()),
        tensor(shape=nested()),
        b"N" + b"\x85" * 20_000,  # a tuple in a tuple in a tuple
        b"(" * 20_000,
        b"]q\x00h\x00a",  # a list that holds itself
    ],
    ids=range(8),
)
def test_nesting_and_repetition_cost_nothing(value: bytes) -> None:
    start = time.process_time()
    with pytest.raises(WeightsError) as caught:
        read(zipped(state(value)))
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 500


@pytest.mark.slow
@pytest.mark.parametrize("step", [b"}", b"("])
def test_a_long_description_ends_within_seconds(step: bytes) -> None:
    start = time.process_time()
    with pytest.raises(WeightsError, match="its description takes over 1000000 steps"):
        read(legacy(b"\x80\x02" + step * 1_000_001 + b"."))
    assert time.process_time() - start < 10


def test_other_networks_take_no_torch_file(tmp_path: Path) -> None:
    """The same names and shapes would fit, and give other features: other pixels, padding and epsilon."""
    from features.networks.backbones import BACKBONES

    (tmp_path / "net.pth").write_bytes(real("zip"))
    with pytest.raises(WeightsError, match=r"a PyTorch file does not fit this network"):
        assign_from_file(None, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"^resnet50: .* a .pth fits only efficientnet-lite0, efficientnet-lite2$"):
        assign_from_file(None, tmp_path / "net.pth", BACKBONES["resnet50"].from_torch)
