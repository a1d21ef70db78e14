"""What must hold before an update is placed. Only names, full shapes and full tensors decide,
so that every rank of a replica comes to the same answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import torch

from engine.errors import ChecksumMismatch, ManifestMismatch, NonFiniteWeights
from engine.numerics import dtype_name
from engine.protocol import TensorSpec
from engine.weights import finite
from engine.weights.catalog import Catalog
from engine.weights.layouts import torch_dtype
from engine.weights.staging import OpenUpdate, tied_differ
from engine.weights.torn import and_more


def announced_tensors(
    manifest: Sequence[TensorSpec], catalog: Catalog, *, partial: bool
) -> dict[str, TensorSpec]:
    """The manifest by name. Raises ManifestMismatch when it is not of this model."""
    announced = {spec.name: spec for spec in manifest}
    if len(announced) < len(manifest):
        seen: set[str] = set()
        for spec in manifest:
            if spec.name in seen:
                raise ManifestMismatch(f"{spec.name} is announced twice", field=spec.name)
            seen.add(spec.name)
    for spec in manifest:
        catalog.check(spec.name, spec.shape)
        catalog.check_dtype(spec.name, torch_dtype(spec.dtype, spec.name))
    require_halves({s.name: torch_dtype(s.dtype, s.name) for s in manifest}, catalog)
    _require_units_once(announced, catalog)
    if announced and not partial:
        require_all(announced, catalog)
    return announced


def _require_units_once(announced: Mapping[str, TensorSpec], catalog: Catalog) -> None:
    fused = [name for name in announced if catalog.is_fused(name)]
    if not fused:
        return
    seen = dict.fromkeys(announced, "")
    for name in fused:
        for unit in catalog.units(name):
            if unit in seen:
                other = seen[unit] or "its own name"
                raise ManifestMismatch(
                    f"{unit} is announced twice: as part of {name} and under {other}", field=unit
                )
            seen[unit] = name


def require_halves(dtypes: Mapping[str, torch.dtype], catalog: Catalog) -> None:
    """Raise ManifestMismatch for an encoded tensor without its scales, or scales without one."""
    if not catalog.has_scales:
        return
    for name, dtype in dtypes.items():
        other = catalog.other_half(name, dtype)
        found = dtypes.get(other) if other else None
        if other and found is None:
            raise ManifestMismatch(
                f"{other} does not come, and {name} in {dtype_name(dtype)} is half of the two: "
                "send both, or the weight alone in a float dtype",
                field=other,
            )
        if other and catalog.are_scales(name) and found is not None and found.is_floating_point:
            raise ManifestMismatch(
                f"{name} comes beside {other} in {dtype_name(found)}, which has no scales yet: "
                "send the weight alone, or as int8",
                field=name,
            )


def require_all(names: Iterable[str], catalog: Catalog) -> None:
    """Raise ManifestMismatch unless `names` are all tensors of the model."""
    missing = catalog.missing(names)
    if missing:
        raise ManifestMismatch(
            f"{and_more(missing)} missing; send every tensor, or begin with partial=True",
            field=missing[0],
        )


def require_complete(update: OpenUpdate, catalog: Catalog, torn: Mapping[str, int]) -> None:
    """Raise ManifestMismatch when a tensor is missing, half here, or unlike its second name.

    torn: tensors that failed in-place updates left half-written, and their versions.
    """
    unfinished = update.unfinished()
    if unfinished is not None:
        name, (start, stop) = unfinished
        raise ManifestMismatch(f"elements [{start}, {stop}) of {name} did not come", field=name)
    names = update.names
    if update.announced.keys() - names:
        units = (unit for name in update.announced for unit in catalog.units(name))
        absent = next((unit for unit in units if unit not in names), None)
        if absent is not None:
            raise ManifestMismatch(f"{absent} was announced and did not come", field=absent)
    require_halves(names, catalog)
    if not update.begin.partial:
        require_all(names, catalog)
    left = sorted(torn.keys() - catalog.covered(names)) if torn else []
    if left:
        raise ManifestMismatch(
            f"{and_more(left)} half-written by the failed update to version {torn[left[0]]}; "
            "this update must bring them too",
            field=left[0],
        )
    _compare_tied(update, catalog)


def require_bits(
    update: OpenUpdate,
    catalog: Catalog,
    device: torch.device,
    *,
    again: Set[str] = frozenset(),
    only: Set[str] | None = None,
) -> None:
    """Raise ChecksumMismatch naming a tensor whose bits are not those announced, and
    NonFiniteWeights naming one that holds what cannot be served.

    Each tensor is read once: where a checksum was announced, on its pass, on `device`; one that
    was written in place, where it serves; any other where it lies, unless `scan_staged` did.
    only: the staged tensors to read; all if None. again: those to read whoever did before.
    """
    sums, unread, known = update.sums, [], []
    for name, tensor in update.staged.items():
        if only is not None and name not in only:
            continue
        spec, start = update.sum_of(name)
        if spec is not None:
            sums.add(spec.name, tensor.to(device, non_blocking=True), start)
        elif name in update.peaks and name not in again:
            known.append((name, update.peaks[name], tensor.dtype, catalog.dtype(name)))
        elif catalog.is_needed(name) and tensor.is_floating_point():
            unread.append((name, tensor, catalog.dtype(name)))
    for canonical, name in update.placed.items() if only is None else ():
        if name in update.peaks:
            known.append((name, update.peaks[name], update.names[name], catalog.dtype(name)))
        elif not update.is_summed(name) and catalog.is_needed(name):
            unread += [(name, stored, stored.dtype) for stored in catalog.floats(canonical)]
    scans = sums.scans()
    for name, scanned in scans.items():
        expected = update.announced[name].checksum
        if scanned.checksum != expected:
            raise ChecksumMismatch(
                f"{name} arrived with checksum {scanned.checksum:#018x}, announced was "
                f"{expected:#018x}",
                field=name,
            )
    known += [
        (name, scanned.peak, scanned.dtype, catalog.dtype(name))
        for name, scanned in scans.items()
        if catalog.is_needed(name)
    ]
    unfit = finite.first_unfit(known) or finite.find_unfit(unread)
    if unfit is not None:
        name, why = unfit
        raise NonFiniteWeights(
            f"{name} of the update to version {update.version} {why}; nothing can be served "
            "with it",
            field=name,
        )


def scan_staged(update: OpenUpdate, catalog: Catalog) -> None:
    """Read what came and waits for the commit, so that `require_bits` need not; waits for the
    device. For transfers, which run beside steps, as the commit does not.

    What comes with a checksum is left to the commit, which is to see what it places.
    """
    scan(update, catalog, update.staged)


def scan(update: OpenUpdate, catalog: Catalog, tensors: Mapping[str, torch.Tensor]) -> None:
    """The same for some units: `tensors` are what is staged of them, or live and final."""
    by_dtype: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        left = name in update.peaks or update.sum_of(name)[0] is not None
        if not left and catalog.is_needed(name) and tensor.is_floating_point():
            by_dtype.setdefault((tensor.device, tensor.dtype), []).append(name)
    for members in by_dtype.values():
        found = finite.find_peaks([tensors[name] for name in members])
        update.peaks.update(zip(members, found, strict=True))


def _cut(
    name: str, tensor: torch.Tensor | None, update: OpenUpdate, catalog: Catalog
) -> torch.Tensor | None:
    """What is staged of a unit, as this rank's excerpt of it."""
    if tensor is None or name in update.excerpts:
        return tensor
    return catalog.cut(name, tensor)


def _compare_tied(update: OpenUpdate, catalog: Catalog) -> None:
    for alias, name in catalog.aliases.items():
        one, other = update.staged.get(alias), update.staged.get(name)
        if (alias in update.excerpts) != (name in update.excerpts):
            one, other = _cut(alias, one, update, catalog), _cut(name, other, update, catalog)
        if one is not None and other is not None:
            served = catalog.dtype(name)
            differ = not torch.equal(one.to(served), other.to(one.device, served))
        elif name in update.placed and (one is not None or other is not None):
            staged = alias if one is not None else name
            is_excerpt = staged in update.excerpts
            differ = not catalog.holds(staged, update.staged[staged], is_excerpt=is_excerpt)
        else:
            differ = False
        if differ:
            raise tied_differ(alias, name)
