"""BlockPlan on small hand-made modules: choosing blocks, layout, homing, the spec and the fingerprint."""

from __future__ import annotations

import copy
import hashlib
import types
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from parablock_rt.blocks.flat import FlatBlock
from parablock_rt.blocks.layout import BlockSpec, ParameterSpec, PlanSpec
from parablock_rt.blocks.plan import BlockPlan
from parablock_rt.errors import ConfigError, PlanError, PlanMismatchError

LAYER_NAMES = ("norm.weight", "norm.bias", "proj.weight", "proj.bias")


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.norm(x))


class Tiny(nn.Module):
    """Embedding, layers, norm and head; the norm is defined before the layers although it runs behind them."""

    def __init__(self, layers: int = 3, width: int = 10, tie: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, width)
        self.project_in = nn.Linear(width, width, bias=False)
        self.final_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 7, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.project_in(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final_norm(x))


def bag(*tensors: Tensor) -> nn.Module:
    """A module with parameters "p.0", "p.1" and so on."""
    module = nn.Module()
    module.p = nn.ParameterList([nn.Parameter(t, requires_grad=t.is_floating_point()) for t in tensors])
    return module


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def gaps_are_zero(home: FlatBlock) -> bool:
    covered = torch.zeros(home.block.flat_numel, dtype=torch.bool)
    for slot in home.block.slots:
        covered[slot.offset : slot.offset + slot.numel] = True
    whole = torch.cat([flat.detach().float() for flat in home.flats])
    return not whole[~covered].any()


# Choosing blocks


def test_default_plan_has_one_block_a_layer_and_freezes_the_rest() -> None:
    plan = BlockPlan.from_model(Tiny())
    assert [b.name for b in plan.blocks] == ["layers.0", "layers.1", "layers.2"]
    assert plan.blocks[1].parameters == [f"layers.1.{name}" for name in LAYER_NAMES]
    assert [n for n, _ in plan.frozen] == [
        "embed.weight",
        "project_in.weight",
        "final_norm.weight",
        "final_norm.bias",
        "head.weight",
    ]
    assert all("outer='freeze'" in reason for _, reason in plan.frozen)


def test_outer_train_sorts_what_runs_before_and_behind_the_layers() -> None:
    plan = BlockPlan.from_model(Tiny(), outer="train")
    assert [b.name for b in plan.blocks] == ["embeddings", "layers.0", "layers.1", "layers.2", "head"]
    assert plan.blocks[0].parameters == ["embed.weight", "project_in.weight"]
    assert plan.blocks[-1].parameters == ["final_norm.weight", "final_norm.bias", "head.weight"]
    assert plan.frozen == []


def test_a_head_tied_to_the_embedding_is_planned_once_and_an_empty_block_left_out() -> None:
    model = Tiny(tie=True)
    for p in model.final_norm.parameters():
        p.requires_grad_(False)
    plan = BlockPlan.from_model(model, outer="train")
    assert [b.name for b in plan.blocks] == ["embeddings", "layers.0", "layers.1", "layers.2"]
    assert plan.aliases == {"embed.weight": ["head.weight"]}


def test_module_used_as_two_layers_forms_one_block() -> None:
    model = Tiny()
    model.layers[2] = model.layers[0]
    assert [b.name for b in BlockPlan.from_model(model).blocks] == ["layers.0", "layers.1"]


def test_lists_inside_a_layer_and_smaller_towers_are_not_taken_for_the_layers() -> None:
    model = Tiny(layers=2)
    for layer in model.layers:
        layer.experts = nn.ModuleList(nn.Linear(10, 10) for _ in range(9))
    model.codebooks = nn.ModuleList(nn.Embedding(1000, 10) for _ in range(4))
    model.vision = nn.ModuleList(nn.Linear(10, 10) for _ in range(12))
    model.layers.insert(1, nn.Identity())
    assert [b.name for b in BlockPlan.from_model(model).blocks] == ["layers.0", "layers.2"]


def test_where_all_trains_each_layer_of_an_encoder_is_a_block_too_and_a_tiny_list_is_none() -> None:
    model = Tiny(layers=2)
    model.encoder = nn.Module()
    model.encoder.block = nn.ModuleList(Layer(10) for _ in range(2))
    model.encoder.final_norm = nn.LayerNorm(10)
    model.tiny = nn.ModuleList([nn.Linear(1, 1)])
    model.layers.append(model.layers[0])
    frozen = BlockPlan.from_model(model)
    assert [b.name for b in frozen.blocks] == ["layers.0", "layers.1"]
    names = {b.name: b.parameters for b in BlockPlan.from_model(model, outer="train").blocks}
    assert {"layers.0", "layers.1", "encoder.block.0", "encoder.block.1"} < names.keys()
    assert not any(name.startswith("tiny") for name in names)
    assert "tiny.0.weight" in (*names["embeddings"], *names["head"])


def test_a_model_without_layers_gives_an_error_that_shows_how_to_name_blocks() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r'none in Sequential; .*blocks=\["model\.layers\.0", "model\.layers\.1"\]'):
        BlockPlan.from_model(model)
    assert [b.numel for b in BlockPlan.from_model(model, blocks=["0", "1"]).blocks] == [12, 12]


def test_a_fully_frozen_model_and_trainable_parameters_outside_the_layers_only_are_errors() -> None:
    model = Tiny().requires_grad_(False)
    with pytest.raises(PlanError, match=r"'embed\.weight': requires_grad is False"):
        BlockPlan.from_model(model)
    model.head.requires_grad_(True)
    with pytest.raises(PlanError, match=r"layers 'layers', found only 'head\.weight' outside"):
        BlockPlan.from_model(model)


def test_a_number_of_blocks_cuts_at_whole_parameters_of_about_equal_size() -> None:
    sizes = [10, 10, 10, 30, 5, 25, 85, 5]
    plan = BlockPlan.from_model(bag(*(torch.ones(s) for s in sizes)), blocks=3)
    assert [b.numel for b in plan.blocks] == [60, 30, 90]
    assert [n for b in plan.blocks for n in b.parameters] == [f"p.{i}" for i in range(8)]
    for count in (0, 9, True):
        with pytest.raises(PlanError, match=r"between 1 and the number of trainable parameters, 8"):
            BlockPlan.from_model(bag(*(torch.ones(s) for s in sizes)), blocks=count)


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=12), data=st.data())
def test_any_possible_number_of_blocks_keeps_order_and_leaves_none_empty(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    plan = BlockPlan.from_model(bag(*(torch.empty(s, device="meta") for s in sizes)), blocks=count)
    assert len(plan.blocks) == count
    assert all(b.slots for b in plan.blocks)
    assert [n for b in plan.blocks for n in b.parameters] == [f"p.{i}" for i in range(len(sizes))]


def test_named_blocks_take_prefixes_globs_and_lists() -> None:
    plan = BlockPlan.from_model(Tiny(layers=11), blocks=["layers.1", ["layers.[02].", "head"], "*.10.proj"])
    assert [b.name for b in plan.blocks] == ["layers.1", "layers.[02]., head", "*.10.proj"]
    assert plan.blocks[0].parameters == [f"layers.1.{name}" for name in LAYER_NAMES]
    assert len(plan.blocks[1].slots) == 9
    assert plan.blocks[2].parameters == ["layers.10.proj.weight", "layers.10.proj.bias"]
    assert ("layers.10.norm.weight", "not named by any item of blocks") in plan.frozen


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["layers.0", "layer"], r"'layer' in item 1 of blocks matches no parameter"),
        ([["layers.0", "nothing*"]], r"'nothing\*' in item 0"),
        (["layers.0", "*.norm"], r"'layers\.0\.norm\.weight' is matched by two items .* 'layers\.0' and '\*\.norm'"),
        (["final_norm"], r"no parameter to train \('final_norm\.weight': requires_grad is False\)"),
        (["embed", "head"], r"no parameter to train \('embed\.weight': it is tied to a parameter of an earlier item\)"),
        ([], r"found \[\]"),
        ("layers.0", r"found 'layers\.0'"),
        ([[]], r"item 0 of blocks to be"),
    ],
)
def test_named_blocks_that_do_not_fit_are_errors(blocks: list[str], message: str) -> None:
    model = Tiny(tie=True)
    model.final_norm.requires_grad_(False)
    with pytest.raises(PlanError, match=message):
        BlockPlan.from_model(model, blocks=blocks)


def test_a_tied_parameter_goes_to_the_first_item_that_reaches_it_by_any_name() -> None:
    plan = BlockPlan.from_model(Tiny(tie=True), blocks=["head", ["embed", "project_in"]])
    assert [b.parameters for b in plan.blocks] == [["embed.weight"], ["project_in.weight"]]


def test_parameters_that_cannot_be_trained_are_listed_with_the_reason() -> None:
    model = bag(
        torch.ones(4),
        torch.ones(4, dtype=torch.int8),
        torch.ones(4, dtype=torch.float64),
        torch.ones(0),
        torch.ones(4),
        torch.ones(4),
        TwoTensor(torch.ones(4), torch.ones(4)),
        torch.ones(4).to(torch.float8_e4m3fn),
    )
    model.p[4].requires_grad_(False)
    model.p[5].quant_state = types.SimpleNamespace(absmax=torch.ones(1))
    plan = BlockPlan.from_model(model, blocks=1)
    assert plan.blocks[0].parameters == ["p.0"]
    assert plan.frozen == [
        ("p.1", "not floating point (int8)"),
        ("p.2", "float64 is unsupported (fp32, bf16 and fp16 are)"),
        ("p.3", "has no elements"),
        ("p.4", "requires_grad is False"),
        ("p.5", "quantised (Parameter)"),
        ("p.6", "a tensor subclass (TwoTensor) that has no flat memory"),
        ("p.7", "float8_e4m3fn is unsupported (fp32, bf16 and fp16 are)"),
    ]


@pytest.mark.parametrize(
    ("dtype", "trains", "fix"),
    [(torch.float64, True, r"cast the model with model\.float\(\)"), (torch.float32, False, "set requires_grad=True")],
)
def test_a_model_that_cannot_be_trained_is_refused_with_what_to_do(dtype: torch.dtype, trains: bool, fix: str) -> None:
    with pytest.raises(PlanError, match=rf"found only others, such as '.*; {fix}$"):
        BlockPlan.from_model(Tiny().requires_grad_(trains).to(dtype))


# Layout and homing


def strided(tensor: Tensor, flip: bool) -> Tensor:
    """The same values, with the dimensions in reverse order in memory if `flip`."""
    reverse = tuple(reversed(range(tensor.dim())))
    return tensor.permute(reverse).contiguous().permute(reverse) if flip else tensor


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple) | st.integers(120, 270).map(lambda n: (n,))


@settings(deadline=None)
@given(parts=st.lists(st.tuples(shapes, dtypes, st.booleans()), min_size=1, max_size=7))
def test_layout_is_aligned_disjoint_and_grouped_and_homing_keeps_every_bit(
    parts: list[tuple[tuple[int, ...], torch.dtype, bool]],
) -> None:
    torch.manual_seed(0)
    model = bag(*(strided(torch.randn(shape).to(dtype), flip) for shape, dtype, flip in parts))
    before = [(p.shape, bits(p)) for p in model.p]
    plan = BlockPlan.from_model(model, blocks=1)
    (block,) = plan.blocks
    assert block.parameters == [f"p.{i}" for i in range(len(parts))]
    assert block.numel == sum(p.numel() for p in model.p)
    by_offset = sorted(block.slots, key=lambda s: s.offset)
    end = 0
    for slot in by_offset:
        assert slot.offset % 128 == 0
        assert end <= slot.offset < end + 128
        end = slot.offset + slot.numel
    assert block.flat_numel % 128 == 0
    assert end <= block.flat_numel < end + 128
    order = [torch.float32, torch.bfloat16, torch.float16]
    assert [s.dtype for s in block.segments] == [d for d in order if d in {p.dtype for p in model.p}]
    ends = [s.start + s.length for s in block.segments]
    assert [0, *ends] == [*(s.start for s in block.segments), block.flat_numel]
    for segment in block.segments:
        inside = [s.offset for s in block.slots if segment.start <= s.offset < segment.start + segment.length]
        assert inside == [s.offset for s in block.slots if s.dtype == segment.dtype] == sorted(inside)

    (home,) = plan.materialise(model)
    assert [(f.dtype, f.shape) for f in home.flats] == [(s.dtype, (s.length,)) for s in block.segments]
    assert gaps_are_zero(home)
    for p, q, (shape, content) in zip(model.p, home.params, before, strict=True):
        assert p is q
        assert p.shape == shape
        assert p.is_contiguous()
        assert torch.equal(bits(p), content)
    for flat in home.flats:
        flat.fill_(3)
    assert all((p == 3).all() for p in model.p)


def test_infinities_nan_payloads_and_negative_zero_survive_homing() -> None:
    pattern = torch.tensor([0x7FC00001, -8388607, -(2**31), 0x7F800000, 1], dtype=torch.int32)
    model = bag(pattern.view(torch.float32).clone(), torch.ones(3))
    BlockPlan.from_model(model, blocks=1).materialise(model)
    assert torch.equal(model.p[0].detach().view(torch.int32), pattern)


def test_homing_keeps_parameter_objects_ties_output_and_frozen_tensors() -> None:
    model = Tiny(tie=True)
    tokens = torch.arange(7).reshape(1, 7)
    expected, objects = model(tokens), dict(model.named_parameters(remove_duplicate=False))
    frozen_address = model.project_in.weight.data_ptr()
    plan = BlockPlan.from_model(model, blocks=["embed", "layers"])
    homes = plan.materialise(model)
    assert torch.equal(model(tokens), expected)
    assert all(objects[n] is p for n, p in model.named_parameters(remove_duplicate=False))
    assert model.head.weight is model.embed.weight is homes[0].params[0]
    assert model.project_in.weight.data_ptr() == frozen_address
    homes[0].flats[0].zero_()
    assert not model.head.weight.any()


def test_a_second_homing_copies_nothing_and_casting_or_a_dirty_gap_makes_a_new_buffer() -> None:
    model = Tiny()
    plan = BlockPlan.from_model(model)
    first, second = plan.materialise(model), plan.materialise(model)
    for a, b in zip(first, second, strict=True):
        assert a.flats[0].data_ptr() == b.flats[0].data_ptr()
        assert a.flats[0].shape == b.flats[0].shape
    twin = plan.materialise(copy.deepcopy(model))
    assert twin[0].flats[0].data_ptr() != first[0].flats[0].data_ptr()
    assert torch.equal(twin[0].flats[0], first[0].flats[0])
    first[0].flats[0][11] = 1.0
    (third, *_) = plan.materialise(model)
    assert third.flats[0].data_ptr() != first[0].flats[0].data_ptr()
    assert gaps_are_zero(third)
    model.to(torch.float64).to(torch.float32)
    fourth = plan.materialise(model)
    assert model.layers[0].norm.weight.data_ptr() == fourth[0].flats[0].data_ptr()


@pytest.mark.parametrize("layout", ["transposed", "swapped"])
def test_a_storage_of_the_right_size_in_another_arrangement_is_not_taken_for_a_flat_buffer(layout: str) -> None:
    store = torch.randn(256)
    tensors = [store.view(16, 16).T] if layout == "transposed" else [store[128:], store[:128]]
    expected = torch.cat([t.reshape(-1) for t in tensors])
    model = bag(*tensors)
    (home,) = BlockPlan.from_model(model, blocks=1).materialise(model)
    assert torch.equal(home.flats[0], expected)
    assert torch.equal(torch.cat([p.detach().view(-1) for p in model.p]), expected)


def test_old_storage_is_released_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.ones(130, dtype=np.float32) for _ in range(6)]
    alive = [weakref.ref(array) for array in arrays]
    model = bag(*map(torch.from_numpy, arrays))
    plan = BlockPlan.from_model(model, blocks=3)
    arrays.clear()
    at_allocation: list[int] = []
    zeros = torch.zeros

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        at_allocation.append(sum(ref() is not None for ref in alive))
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", counting)
    plan.materialise(model)
    assert at_allocation == [6, 4, 2]
    assert not any(ref() is not None for ref in alive)


def test_a_training_step_shows_in_the_flat_buffer() -> None:
    model = Tiny()
    homes = BlockPlan.from_model(model).materialise(model)
    before = [home.flats[0].clone() for home in homes]
    optimizer = torch.optim.SGD(model.layers[1].parameters(), lr=0.1)
    model(torch.arange(7)[None]).square().sum().backward()
    optimizer.step()
    assert [torch.equal(h.flats[0], b) for h, b in zip(homes, before, strict=True)] == [True, False, True]
    assert gaps_are_zero(homes[1])


def test_views_lay_the_parameters_over_another_buffer_of_the_block() -> None:
    model = bag(torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(130), torch.ones(()))
    (home,) = BlockPlan.from_model(model, blocks=1).materialise(model)
    master = torch.zeros(home.block.flat_numel)
    for i, view in enumerate(home.views(master)):
        view.fill_(i + 1)
    assert [v.shape for v in home.views(master)] == [p.shape for p in home.params]
    assert [(s.dtype, s.start, s.length) for s in home.block.segments] == [
        (torch.float32, 0, 384),
        (torch.bfloat16, 384, 128),
    ]
    assert [master[s.offset : s.offset + s.numel].unique().tolist() for s in home.block.slots] == [[1], [2], [3]]
    assert master.count_nonzero() == 15 + 130 + 1
    for bad in (torch.zeros(511), torch.zeros(2, 256), torch.zeros(1024)[::2]):
        with pytest.raises(PlanError, match=r"shape \(512,\)"):
            home.views(bad)


def test_memory_shared_by_untied_parameters_is_refused_but_neighbours_in_one_storage_are_not() -> None:
    model = Tiny()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    with pytest.raises(PlanError, match=r"'embed.weight' and 'head.weight' share memory"):
        BlockPlan.from_model(model, blocks=["embed"]).materialise(model)
    BlockPlan.from_model(model).materialise(model)  # neither is trained: the tie stays whole
    fused = torch.arange(12.0).reshape(4, 3)
    rows = bag(fused[:2], fused[2:])
    BlockPlan.from_model(rows, blocks=1).materialise(rows)
    assert torch.equal(torch.cat(list(rows.p)), fused)


def test_homing_on_the_meta_device_over_two_devices_or_of_another_model_is_an_error() -> None:
    plan = BlockPlan.from_model(Tiny())
    meta = Tiny().to("meta")
    assert BlockPlan.from_model(meta).digest == plan.digest
    with pytest.raises(PlanError, match=r"'layers\.0' on one real device, found meta"):
        plan.materialise(meta)
    mixed = Tiny()
    mixed.layers[0].norm.to("meta")
    with pytest.raises(PlanError, match="found cpu, meta"):
        plan.materialise(mixed)
    with pytest.raises(PlanMismatchError, match=r"'layers.0.norm.weight' \(10,\) 'fp32'; this model has .* \(12,\)"):
        plan.materialise(Tiny(width=12))


# Digest, spec, description, fingerprint


def test_digest_depends_on_names_shapes_dtypes_and_order_and_on_nothing_else() -> None:
    def digest(*tensors: Tensor, blocks: object = 1) -> str:
        return BlockPlan.from_model(bag(*tensors), blocks=blocks).digest  # type: ignore[arg-type]

    base = digest(torch.ones(2, 3), torch.ones(4))
    assert base == digest(torch.zeros(2, 3), torch.zeros(4))
    assert base == digest(torch.ones(2, 3), torch.ones(4), torch.ones(9, dtype=torch.int8))
    others = [
        digest(torch.ones(3, 2), torch.ones(4)),
        digest(torch.ones(2, 3), torch.ones(4).bfloat16()),
        digest(torch.ones(2, 3), torch.ones(4), blocks=2),
        digest(torch.ones(2, 3), torch.ones(4), blocks=["p"]),
        digest(torch.ones(2, 3), torch.ones(4), torch.ones(1)),
        digest(torch.ones(2, 3), torch.ones(4), blocks=["p.0", "p.1"]),
        digest(torch.ones(2, 3), torch.ones(4), blocks=["p.1", "p.0"]),
    ]
    assert len({base, *others}) == 8
    # Written out, for a change of the description would part old and new peers.
    text = b'["block-plan-1", [["block.0", [["p.0", [2, 3], "fp32", 0], ["p.1", [4], "fp32", 128]]]]]'
    assert base == hashlib.sha256(text).hexdigest()


def test_spec_crosses_the_wire_and_gives_the_same_plan_on_a_model_that_is_frozen_there() -> None:
    plan = BlockPlan.from_model(Tiny(tie=True), outer="train")
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(plan.spec()), type=PlanSpec)
    assert received == plan.spec()
    client = Tiny(tie=True).requires_grad_(False)
    copy_of_it = BlockPlan.from_spec(client, received)
    assert copy_of_it.digest == plan.digest
    assert copy_of_it.blocks == plan.blocks
    assert copy_of_it.frozen == plan.frozen == []
    partial = BlockPlan.from_spec(client, PlanSpec(received.blocks[:-1]))
    assert partial.frozen[0] == ("final_norm.weight", "requires_grad is False")
    plan.check_same(received)


def changed(spec: PlanSpec, block: int, index: int, **values: object) -> PlanSpec:
    parameters = list(spec.blocks[block].parameters)
    parameters[index] = msgspec.structs.replace(parameters[index], **values)
    blocks = list(spec.blocks)
    blocks[block] = msgspec.structs.replace(blocks[block], parameters=tuple(parameters))
    return PlanSpec(tuple(blocks))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "layers.1.gate"}, r"'layers\.1\.gate' \(10, 10\) 'fp32'; this model \(Tiny\) has none of that name"),
        ({"shape": (10, 20)}, r"'layers\.1\.proj\.weight' \(10, 20\) 'fp32'; this model has .* \(10, 10\) 'fp32'"),
        ({"shape": (-1, 2**60)}, r"\(-1, 1152921504606846976\)"),
        ({"shape": (1,) * 100_000}, r"\(1, 1, 1, 1, 1, 1, \.\.\.\)"),
        ({"dtype": "bf16"}, r"\(10, 10\) 'bf16'; this model has .* \(10, 10\) 'fp32'"),
        ({"dtype": "x" * 10_000}, r"'x{200}\.\.\.'"),
        ({"name": "layers.0.proj.weight"}, r"in addition to 'layers\.0\.proj\.weight'; in this model both are one"),
    ],
)
def test_from_spec_and_check_same_name_the_parameter_that_differs(values: dict[str, object], message: str) -> None:
    plan = BlockPlan.from_model(Tiny())
    spec = changed(plan.spec(), 1, 2, **values)
    with pytest.raises(PlanMismatchError, match=message) as caught:
        BlockPlan.from_spec(Tiny(), spec)
    assert len(str(caught.value)) < 1000
    with pytest.raises(PlanMismatchError, match=r"parameter 2 of block 'layers\.1' is .* on the server") as caught:
        plan.check_same(spec)
    assert len(str(caught.value)) < 1000


def test_from_spec_says_how_a_wrapped_model_is_unwrapped() -> None:
    wrapped = nn.Module()
    wrapped.module = Tiny()
    with pytest.raises(
        PlanMismatchError, match=r"_orig_mod.*model\.compile\(\).*module.*inside DistributedDataParallel"
    ):
        BlockPlan.from_spec(wrapped, BlockPlan.from_model(wrapped.module).spec())


def test_from_spec_refuses_weights_tied_here_only_and_weights_quantised_here() -> None:
    spec = BlockPlan.from_model(Tiny(), outer="train").spec()
    with pytest.raises(PlanMismatchError, match=r"'head\.weight' .* in addition to 'embed\.weight'"):
        BlockPlan.from_spec(Tiny(tie=True), spec)
    model = Tiny()
    model.layers[0].proj.weight.quant_state = types.SimpleNamespace(absmax=torch.ones(1))
    with pytest.raises(PlanMismatchError, match=r"'layers\.0\.proj\.weight' \(10, 10\) 'fp32', quantised"):
        BlockPlan.from_spec(model, spec)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, "layers.1"])
def test_from_spec_refuses_unusable_block_names(name: str) -> None:
    first, second, third = BlockPlan.from_model(Tiny()).spec().blocks
    with pytest.raises(PlanMismatchError, match="expected unique block names"):
        BlockPlan.from_spec(Tiny(), PlanSpec((msgspec.structs.replace(first, name=name), second, third)))


def test_empty_specs_and_plans_with_other_blocks_are_refused() -> None:
    plan = BlockPlan.from_model(Tiny())
    with pytest.raises(PlanMismatchError, match="no blocks"):
        BlockPlan.from_spec(Tiny(), PlanSpec(()))
    with pytest.raises(PlanMismatchError, match="block 'a' is empty"):
        BlockPlan.from_spec(Tiny(), PlanSpec((BlockSpec("a", ()),)))
    with pytest.raises(PlanMismatchError, match="the server has 2 blocks, this plan 3"):
        plan.check_same(PlanSpec(plan.spec().blocks[:2]))
    with pytest.raises(PlanMismatchError, match=r"block 0 is 'embeddings' on the server and 'layers\.0' here"):
        plan.check_same(BlockPlan.from_model(Tiny(), outer="train").spec())
    longer = BlockSpec("layers.0", (*plan.spec().blocks[0].parameters, ParameterSpec("more", (1,), "fp32")))
    with pytest.raises(PlanMismatchError, match=r"is 'more' \(1,\) 'fp32' on the server and absent here"):
        plan.check_same(PlanSpec((longer, *plan.spec().blocks[1:])))


def test_description_has_sizes_ties_totals_and_the_frozen_parameters() -> None:
    plan = BlockPlan.from_model(Tiny(tie=True))
    text = plan.describe()
    # norm 10 + 10, proj 100 + 10 elements: four slots of 128, so 512 elements on the wire.
    assert [plan.blocks[0].wire_bytes(f) for f in ("fp32", "bf16", "int8", "int4")] == [2048, 1024, 520, 272]
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["block", "parameters", "elements", "bf16", "int8", "int4"]
    assert lines[2] == ["layers.0", "4", "130", "1.02", "kB", "520", "B", "272", "B"]
    assert ["total:", "3", "blocks", "12", "390", "3.07", "kB", "1.56", "kB", "816", "B"] in lines
    assert "tied: embed.weight = head.weight" in text
    assert "frozen: 4 parameters, 190 elements, outside the decoder layers" in text
    with pytest.raises(ConfigError, match="found 'fp8'"):
        plan.describe(formats=("fp8",))
    with pytest.raises(ConfigError, match="found 'drop'"):
        BlockPlan.from_model(Tiny(), outer="drop")  # type: ignore[arg-type]


def test_frozen_fingerprint_covers_frozen_parameters_and_persistent_float_buffers_only() -> None:
    def fingerprint(edit: str = "") -> str:
        model = Tiny()
        model.register_buffer("scale", torch.ones(()))
        model.register_buffer("cache", torch.ones(3), persistent=False)
        model.register_buffer("steps", torch.ones(3, dtype=torch.int64))
        model.codes = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
        model.codes.quant_state = types.SimpleNamespace(
            absmax=torch.ones(2), blocksize=64, state2=types.SimpleNamespace(absmax=torch.ones(1))
        )
        model.pair = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)), requires_grad=False)
        exec(edit, {"model": model, "torch": torch, "nn": nn})
        return BlockPlan.from_model(model).frozen_fingerprint(model)

    base = fingerprint()
    for same in ("model.layers[0].proj.bias.data += 1", "model.cache += 1", "model.steps += 1"):
        assert fingerprint(same) == base
    different = [
        "model.head.weight.data[6, 9] += 1e-7",
        "model.scale += 1",
        "model.codes.data[3] = 7",
        "model.codes.quant_state.absmax[1] = 2",
        "model.codes.quant_state.state2.absmax[0] = 2",
        "model.pair.b.add_(1)",
        "model.head.weight.data = model.head.weight.data.view(10, 7)",
        "model.final_norm.weight.data = model.final_norm.weight.data.bfloat16()",
        "model.head.weight = model.embed.weight",
        "model.extra = nn.Parameter(torch.ones(1))",
    ]
    assert len({base, *map(fingerprint, different)}) == 1 + len(different)


def test_frozen_fingerprint_is_the_same_from_the_spec_and_after_homing_and_needs_real_weights() -> None:
    model = Tiny()
    plan = BlockPlan.from_model(model)
    before = plan.frozen_fingerprint(model)
    plan.materialise(model)
    assert plan.frozen_fingerprint(model) == before
    assert BlockPlan.from_spec(Tiny(), plan.spec()).frozen_fingerprint(Tiny()) == before
    with pytest.raises(PlanError, match="meta device"):
        plan.frozen_fingerprint(Tiny().to("meta"))
