"""What the CUDA kernels are launched with, without a GPU (helpers/posed.py): the arguments of every launch in the
kernel's order, the super-blocks, the stream; the test that a candidate has to pass, and the clock's choice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import posed
from helpers.backends import needs_triton
from helpers.posed import PROCESSORS, SCALED, STREAM, SWAPPED, own_teacher, passes_of, problem

from softclip_kernels.stats import StatisticsGradient, Wanted

pytestmark = needs_triton

DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # of cuda.h
VECTORS = [
    f"{direction}_{of}_{name}"
    for direction in ("row", "column")
    for of in ("student", "teacher")
    for name in ("coefficient", "exponent")
]
STORE, ADD = 0, 1


def tensors(launch_pass, edge=512):
    """What a launch takes of a pass, every tensor its own: arguments by name, and the mirror's scratch."""
    x, n = launch_pass.problem.x, launch_pass.problem.rows
    vectors = {name: torch.zeros(n) for name in VECTORS}
    in_range = {f"{direction}_in_range": torch.zeros(n, dtype=torch.int8) for direction in ("row", "column")}
    slots = ("row_sums", "column_sums", "mirror_row_sums", "mirror_column_sums")
    sums = {name: torch.zeros(4, 3, edge) for name in slots} | {"positive_logit": torch.zeros(n)}
    g, mirror_g = (x.new_zeros(edge, edge) for _ in range(2))
    own = vectors | in_range | sums | {"g": g, "edge": edge}
    return launch_pass.arguments | own, mirror_g


def named(value, known):
    """A pointer, or the matrix of a tensor map, by the name of the tensor that it is of."""
    pointer = value if isinstance(value, int) else value.address
    places = {}
    for name, of in known.items():
        if isinstance(of, torch.Tensor):  # without a teacher its embeddings are the student's, which come first
            places.setdefault(of.data_ptr(), name)
    return places.get(pointer, "nothing" if pointer == 0 else "unknown")


def launches(hopper, known):
    """By the names of the kernels' parameters: of pointers and tensor maps the tensor's name; of numbers the number."""
    found = []
    for launched in hopper.launched:
        kinds, given = posed.KERNELS[launched.name], hopper.arguments(launched)
        assert (launched.grid, launched.block, launched.stream) == ((PROCESSORS, 1, 1), (384, 1, 1), STREAM)
        assert launched.cluster is None and 48 * 1024 < launched.shared_bytes <= 227 * 1024
        found.append({name: given[name] if of == "int" else named(given[name], known) for name, of in kinds.items()})
    return found


def gradient_launches(hopper, of, *blocks, edge=512):
    from softclip_kernels.backends.triton import sm90

    (launch_pass,) = passes_of(of)
    arguments, mirror_g = tensors(launch_pass, edge)
    fill = sm90.GradientBlocks(launch_pass, arguments, mirror_g, sm90.SM90_SHAPE)
    arguments["g"].fill_(1.0)
    for i, j in blocks:
        fill(i, j)
    return launches(hopper, arguments | {"mirror_g": mirror_g}), arguments


def student(put, i, j, positive="positive_column"):
    """The arguments of a launch for a softmax whose rows and columns are the student's."""
    vectors = {
        f"{direction}_{name}": f"{direction}_student_{name}"
        for direction in ("row", "column")
        for name in ("coefficient", "exponent")
    }
    ranges = {"row_start": i.start, "row_end": i.stop, "column_start": j.start, "column_end": j.stop}
    matrices = {"x": "x", "y": "y", "g": "g", "positive_column": positive, "scalars": "scalars"}
    return {
        **matrices,
        **vectors,
        "row_in_range": "row_in_range",
        "column_in_range": "column_in_range",
        **ranges,
        "put": put,
    }


UPPER, RIGHT = slice(0, 512), slice(512, 900)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positive", (True, False))
def test_the_hard_backward_pass(hopper, dtype, positive):
    of = problem(900, dtype=dtype)
    if not positive:
        of = dataclasses.replace(of, positive_column=None)
    (found,), _ = gradient_launches(hopper, of, (UPPER, RIGHT))
    expected = student(STORE, UPPER, RIGHT, "positive_column" if positive else "nothing")
    assert expected.items() <= found.items()
    pointers = {name for name, of in posed.KERNELS["softmax_backward"].items() if of == "pointer"}
    assert {found[name] for name in pointers if name.startswith("mirror")} == {"nothing"}
    x, y, g, _ = (hopper.arguments(hopper.launched[0])[name] for name in ("x", "y", "g", "mirror_g"))
    assert [(each.dtype, each.box, each.sizes, each.strides) for each in (x, y, g)] == [
        (DTYPES[dtype], [64, 64], [128, 900], [256]),
        (DTYPES[dtype], [64, 128], [128, 900], [256]),
        (DTYPES[dtype], [64, 64], [512, 512], [1024]),
    ]
    assert all(each.steps == [1, 1] and each.options == (0, 3, 3, 0) for each in (x, y, g))


def test_rows_that_are_apart_have_their_stride_in_the_map(hopper):
    of = problem(300)
    wide = torch.zeros(300, 192, dtype=torch.bfloat16)[:, 64:]
    gradient_launches(hopper, dataclasses.replace(of, x=wide), (slice(0, 300), slice(0, 300)))
    given = hopper.arguments(hopper.launched[0])
    assert (given["x"].address, given["x"].sizes, given["x"].strides) == (wide.data_ptr(), [128, 300], [384])
    assert given["y"].strides == [256]


def test_an_own_teachers_part_is_added_by_a_second_launch(hopper):
    """Of a kernel that reads the teacher's factor and bound, with its vectors and its own embeddings."""
    from softclip_kernels.backends.triton.tiles import BOUND, FACTOR, TEACHER_BOUND, TEACHER_FACTOR

    (own, added), _ = gradient_launches(hopper, problem(900, teachers=(own_teacher(900),)), (UPPER, RIGHT))
    assert student(STORE, UPPER, RIGHT).items() <= own.items()
    expected = {name: str(value).replace("student", "teacher") for name, value in student(ADD, UPPER, RIGHT).items()}
    expected |= {"x": "teacher_x", "y": "teacher_y"}
    assert {name: str(value) for name, value in added.items() if name in expected} == expected
    student_macros, teacher_macros = (macros for _, macros in hopper.compiler.compiled)
    places = {"FACTOR": str(FACTOR.value), "BOUND": str(BOUND.value), "WIDTH": "128"}
    assert places.items() <= student_macros.items()
    places = {"FACTOR": str(TEACHER_FACTOR.value), "BOUND": str(TEACHER_BOUND.value), "WIDTH": "64"}
    assert places.items() <= teacher_macros.items()


def mirrored(put, i, j, g, mirror_g):
    """A mirrored launch: a row of the tile is a column of the mirror, whose teacher's softmax it takes part in."""
    vectors = {
        "mirror_row_coefficient": "column_teacher_coefficient",
        "mirror_row_exponent": "column_teacher_exponent",
        "mirror_column_coefficient": "row_teacher_coefficient",
        "mirror_column_exponent": "row_teacher_exponent",
    }
    return {**student(put, i, j), **vectors, "g": g, "mirror_g": mirror_g, "mirror_put": put}


@pytest.mark.parametrize("teacher", (SWAPPED, SCALED), ids=("tied", "scaled"))
def test_a_mirrored_super_block_and_its_mirror(hopper, teacher):
    """The one stores both parts, the other adds to both; on the diagonal both parts are added to zeros."""
    found, arguments = gradient_launches(hopper, problem(900, teachers=(teacher,)), (UPPER, RIGHT), (RIGHT, RIGHT))
    assert found == [
        mirrored(STORE, UPPER, RIGHT, "g", "mirror_g"),
        mirrored(ADD, RIGHT, UPPER, "mirror_g", "g"),
        mirrored(ADD, RIGHT, RIGHT, "g", "g"),
    ]
    g = arguments["g"]
    assert hopper.filled == [(g.data_ptr(), 0, g.nbytes, STREAM)] and not g.any()


def sums_launch(hopper, of, edge=512):
    from softclip_kernels.backends.triton import sm90

    (launch_pass,) = passes_of(of)
    arguments, _ = tensors(launch_pass, edge)
    sm90.Sums(launch_pass, arguments)(7, row_start=0, row_end=512, column_start=512, column_end=900)
    (found,) = launches(hopper, arguments)
    return found


def forward_arguments(**others):
    ranges = {"row_start": 0, "row_end": 512, "column_start": 512, "column_end": 900, "edge": 512}
    names = ("x", "y", "positive_column", "scalars", "row_sums", "column_sums", "positive_logit")
    return {**{name: name for name in names}, **ranges, **others}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hard_forward_pass(hopper, dtype):
    assert sums_launch(hopper, problem(900, dtype=dtype)) == forward_arguments()
    given = hopper.arguments(hopper.launched[0])
    assert [(given[name].dtype, given[name].box) for name in "xy"] == [
        (DTYPES[dtype], [64, 64]),
        (DTYPES[dtype], [64, 128]),
    ]


@pytest.mark.parametrize("swapped", (True, False))
def test_the_forward_pass_with_a_teacher(hopper, swapped):
    """Of a swapped pair the teacher's embeddings are the student's, exchanged."""
    found = sums_launch(hopper, problem(900, teachers=(SWAPPED if swapped else own_teacher(900, 128),)))
    teacher = {"teacher_x": "y", "teacher_y": "x"} if swapped else {"teacher_x": "teacher_x", "teacher_y": "teacher_y"}
    mirror = {name: name for name in ("mirror_row_sums", "mirror_column_sums")}
    assert found == forward_arguments(**teacher, **mirror)
    given = hopper.arguments(hopper.launched[0])
    boxes = [given[name].box for name in ("x", "y", "teacher_x", "teacher_y")]
    assert boxes == [[64, 128], [64, 64]] * 2


# In a whole pass.


def whole(of):
    from softclip_kernels.backends.triton import operations

    n, k = of.rows, len(of.teachers)
    statistics = operations.forward(of)
    gradient = StatisticsGradient(torch.ones(1 + k, n), torch.ones(1 + k, n), torch.zeros(n))
    operations.backward(of, statistics, gradient, Wanted(rounded=True))


CASES = {
    "hard": ((), "softmax_forward"),
    "swapped": ((SWAPPED,), "softmax_forward_pair"),
    "own teacher": ((own_teacher(1500, 128),), "softmax_forward_pair"),
}


def ranges_of(hopper, name):
    given = [hopper.arguments(launched) for launched in hopper.launched if launched.name == name]
    return [tuple(each[f"{side}"] for side in ("row_start", "row_end", "column_start", "column_end")) for each in given]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variable", ("SOFTCLIP_CUDA", "SOFTCLIP_CANDIDATE"))
def test_a_pass_is_theirs_where_they_are_asked_for(hopper, monkeypatch, case, variable):
    from softclip_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "SCRATCH", 0)  # of the forward pass, super-blocks as small as tiles allow
    monkeypatch.setenv("SOFTCLIP_GPU_MIB", "2")
    monkeypatch.setenv(variable, {"SOFTCLIP_CUDA": "1", "SOFTCLIP_CANDIDATE": "sm90"}[variable])
    teachers, forward = CASES[case]
    whole(problem(1500, teachers=teachers))
    assert not [name for name in hopper.triton if name in ("softmax_forward_kernel", "softmax_backward_kernel")]
    for name in (forward, "softmax_backward"):
        ranges = ranges_of(hopper, name)
        covered = torch.zeros(1500, 1500, dtype=torch.int32)
        for row_start, row_end, column_start, column_end in ranges:
            covered[row_start:row_end, column_start:column_end] += 1
            if name == "softmax_forward_pair" and case == "swapped" and row_start != column_start:
                covered[column_start:column_end, row_start:row_end] += 1
        assert len(ranges) > 3 and bool(
            (covered == (2 if (case, name[-8:]) == ("own teacher", "backward") else 1)).all()
        )


@pytest.mark.parametrize("case", CASES)
def test_a_pass_that_is_replayed_launches_them_again(hopper, monkeypatch, case):
    """In the same order, on its own operands."""
    from softclip_kernels.backends.triton import recording

    monkeypatch.setenv("SOFTCLIP_CUDA", "1")
    monkeypatch.setenv("SOFTCLIP_GPU_MIB", "2")
    of, seen, followed = problem(1500, teachers=CASES[case][0]), [], []
    follow = recording.Recording.follow
    monkeypatch.setattr(recording.Recording, "follow", lambda *given: (followed.append(1), follow(*given))[1])
    for round in range(4):  # the second is recorded, later ones are replayed
        hopper.launched.clear()
        hopper.filled.clear()
        if round == 3:
            of = dataclasses.replace(of, x=of.x.clone())
        whole(of)
        given = [hopper.arguments(launched) for launched in hopper.launched]
        numbers = [{name: value for name, value in each.items() if name.endswith(("start", "end"))} for each in given]
        names = [launched.name for launched in hopper.launched]
        seen.append((names, numbers, len(hopper.filled)))
        if case == "hard":
            assert {each["x"].address for each in given} == {of.x.data_ptr()}
    assert seen[1:] == seen[:1] * 3 and len(seen[0][0]) > 3 and len(followed) == 4
    assert (seen[0][2] > 0) == (case == "swapped")
