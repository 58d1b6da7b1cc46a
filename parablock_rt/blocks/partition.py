"""Which parameters form which block: the rules by which a plan groups names.

Works on names and sizes; nothing here lays out memory, builds a plan or touches a tensor's values. `trainable` below
lists the names that may be planned, in definition order. Every rule returns (block name, parameter names) in block
order.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from bisect import bisect_left
from collections.abc import Sequence

from torch import nn

from parablock_rt.blocks.rows import RowEmbedding
from parablock_rt.errors import PlanError

_LAST_OUTER = re.compile(r"(^|[._])(final|norm|ln_f|head|out)([._]|$)")
_HOW_TO_NAME = (
    'name the blocks yourself: BlockPlan.from_model(model, blocks=["model.layers.0", "model.layers.1"]) with name '
    'prefixes, blocks=["encoder.*.weight"] with a glob pattern, or blocks=4 for four parts of about equal size'
)
_HOW_TO_PASS = "Give the plan to parablock_rt.serve as plan=; clients need nothing, for they take the server's"


_SMALLEST_TOWER = 0.1  # a list of layers with this share of the decoder's parameters trains in blocks of its own


def _layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost `nn.ModuleList`s that own parameters and contain no embeddings, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not any(isinstance(member, nn.Embedding) for member in module)
            and not any(path.startswith(f"{outer}.") for outer in found)
        ):
            found[path] = module
    return {path: layers for path, layers in found.items() if _numel(layers) > 0}


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def by_layers(
    model: nn.Module, trainable: list[str], outer: str, outer_limit: int | None
) -> list[tuple[str, list[str]]]:
    """One block per decoder layer; with `outer="train"` also one per layer of the other towers, and the parameters
    before and after the layers in blocks of at most `outer_limit` elements. Raises PlanError."""
    lists = _layer_lists(model)
    if not lists:
        kind = type(model).__name__
        raise PlanError(
            f"expected an nn.ModuleList of decoder layers, found none in {kind}; {_HOW_TO_NAME}. {_HOW_TO_PASS}"
        )
    sizes = {path: _numel(layers) for path, layers in lists.items()}
    path = max(sizes, key=sizes.__getitem__)
    least = _SMALLEST_TOWER * sizes[path] if outer == "train" else sizes[path] + 1
    towers = {f"{p}." if p else "": layers for p, layers in lists.items() if p == path or sizes[p] >= least}
    blocks: dict[str, list[str]] = {f"{prefix}{i}": [] for prefix in towers for i in range(len(towers[prefix]))}
    first: list[str] = []
    last: list[str] = []
    behind = False
    wanted = set(trainable)
    for name, _ in model.named_parameters():
        prefix = next((prefix for prefix in towers if name.startswith(prefix)), None)
        layer = "" if prefix is None else prefix + name.removeprefix(prefix).split(".", 1)[0]
        if layer in blocks:
            behind = True
        if name not in wanted:
            continue
        if layer in blocks:
            blocks[layer].append(name)
        elif _is_embedding(model, name):
            first.append(name)
        elif behind or ("emb" not in name and _LAST_OUTER.search(name)):
            last.append(name)
        else:
            first.append(name)
    groups = list(blocks.items())
    if outer == "train":
        numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
        groups = [
            *_pack("embeddings", first, numel, outer_limit),
            *groups,
            *_pack("head", last, numel, outer_limit),
        ]
    groups = [(name, names) for name, names in groups if names]
    if not groups:
        raise PlanError(
            f"expected trainable parameters in the decoder layers {path!r}, found only {trainable[0]!r} outside; "
            f"set requires_grad=True on the layers, pass outer='train', or {_HOW_TO_NAME}"
        )
    return groups


def _is_embedding(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.ParameterList):
        owner = model.get_submodule(name.rpartition(".parts.")[0])
    return isinstance(owner, (nn.Embedding, RowEmbedding))


def _pack(title: str, names: list[str], sizes: dict[str, int], limit: int | None) -> list[tuple[str, list[str]]]:
    """Consecutive parameters in blocks of at most `limit` elements, each as full as possible. Raises PlanError."""
    if limit is None:
        return [(title, names)]
    packed: list[list[str]] = [[]]
    room = limit
    for name in names:
        if sizes[name] > limit:
            raise PlanError(
                f"parameter {name!r} has {sizes[name]:,} elements, more than outer_limit={limit:,}; cut it with "
                "parablock_rt.split_rows(model, outer_limit) before planning, or raise the limit"
            )
        if sizes[name] > room:
            packed.append([])
            room = limit
        packed[-1].append(name)
        room -= sizes[name]
    return [(title if len(packed) == 1 else f"{title}.{i}", members) for i, members in enumerate(packed)]


def by_count(trainable: list[str], sizes: list[int], count: int) -> list[tuple[str, list[str]]]:
    """`count` blocks of consecutive parameters, cut where the running size is nearest to an equal share.

    Raises PlanError for an impossible `count`.
    """
    if isinstance(count, bool) or not 1 <= count <= len(trainable):
        raise PlanError(
            f"expected blocks to be between 1 and the number of trainable parameters, {len(trainable)}, found {count}; "
            "ask for fewer blocks, as a parameter is never split"
        )
    ends = list(itertools.accumulate(sizes))
    cuts = [0]
    for i in range(1, count):
        share = ends[-1] * i / count
        cut = bisect_left(ends, share) + 1
        if cut > 1 and share - ends[cut - 2] <= ends[cut - 1] - share:
            cut -= 1
        cuts.append(min(max(cut, cuts[-1] + 1), len(sizes) - (count - i)))
    cuts.append(len(sizes))
    return [(f"block.{i}", trainable[a:b]) for i, (a, b) in enumerate(itertools.pairwise(cuts))]


def _matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole name or a prefix that ends at a dot; `*`, `?`, `[...]` as in file names."""
    pattern = pattern.removesuffix(".")
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def by_patterns(
    names: dict[str, list[str]], reasons: dict[str, str], items: Sequence[str | Sequence[str]]
) -> list[tuple[str, list[str]]]:
    """One block per item; the patterns within an item may overlap.

    Two items must not match the same name. If they match different names of a tied parameter, the first item gets it.
    `names`: as from `plan._all_names`. `reasons`: why parameters cannot be planned, by name. Raises PlanError.
    """
    if not isinstance(items, (list, tuple)) or not items:
        raise PlanError(
            f"expected blocks to be None, a number, or a list with an item per block, found {items!r}; {_HOW_TO_NAME}"
        )
    owner: dict[str, str] = {}  # every name an item matched -> that item
    taken: set[str] = set()
    groups: list[tuple[str, list[str]]] = []
    for i, item in enumerate(items):
        patterns = [item] if isinstance(item, str) else list(item)
        if not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise PlanError(
                f"expected item {i} of blocks to be a name, a glob or a list of those, found {item!r}; {_HOW_TO_NAME}"
            )
        for pattern in patterns:
            if not any(_matches(pattern, name) for every in names.values() for name in every):
                raise PlanError(
                    f"{pattern!r} in item {i} of blocks matches no parameter; names look like {next(iter(names))!r}; a "
                    f"prefix must end at a dot of the name"
                )
        members: list[str] = []
        seen: list[str] = []
        for first, every in names.items():
            hits = [name for name in every if any(_matches(pattern, name) for pattern in patterns)]
            for name in hits:
                if name in owner:
                    raise PlanError(
                        f"parameter {name!r} is matched by two items of blocks, {owner[name]} and {item!r}; it can "
                        f"belong to one block only: make the patterns disjoint"
                    )
            owner.update(dict.fromkeys(hits, repr(item)))
            if hits:
                seen.append(first)
                if first not in reasons and first not in taken:
                    members.append(first)
        if not members:
            why = reasons.get(seen[0], "it is tied to a parameter of an earlier item")
            raise PlanError(f"item {item!r} of blocks has no parameter to train ({seen[0]!r}: {why}); remove the item")
        taken.update(members)
        title = ", ".join(patterns)
        title = title if len(title) <= 80 else title[:80] + "..."
        groups.append((title if all(title != name for name, _ in groups) else f"{title} #{i}", members))
    return groups
