"""Views and their depth maps put together by name, for the readers of layouts whose files name no pairs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from tasks.capture.folder_tree import stem
from tasks.capture.layout import ViewFiles
from tasks.capture.layouts.layout_reader import Pairs

Key = Callable[[str], str]
"""Gives the part of a path by which files belong together"""

# Endings of renderers and cameras: r_0_depth_0001, a.depth, a_depth, a-color
_KIND = re.compile(r"[._-](?:depth|color|colour|rgb|image|mask|confidence|aligned_depth)(?:[._-]?\d+)?$", re.IGNORECASE)


def frame_number(path: str) -> str:
    """The first number in a file's name, without leading zeros; the whole name if it has none."""
    found = re.search(r"\d+", stem(path))
    return str(int(found.group())) if found else stem(path)


def without_kind(path: str) -> str:
    """A file's stem without an ending that says whether it is colour or depth."""
    return _KIND.sub("", stem(path))


def paired(
    pictures: Iterable[str],
    depth_maps: Iterable[str],
    masks: Iterable[str] = (),
    confidence: Iterable[str] = (),
    confidence_levels: tuple[int, int, int] = ViewFiles.confidence_levels,
    key: Key = without_kind,
) -> Pairs:
    """Put files together whose stems are equal, else those with equal keys, if they are unique."""
    images, depths = by_name(pictures), by_name(depth_maps)
    of_masks, of_confidence, by_key = (grouped_by(key, paths) for paths in (masks, confidence, depth_maps))
    pairs = Pairs(duplicates=[tuple(group) for group in [*images.values(), *depths.values()] if len(group) > 1])
    for name, group in sorted(images.items()):
        alike = by_key.get(key(group[0]), [])
        same = depths.get(name) or depths.get(_depth_stem(name)) or (alike if len(alike) == 1 else [])
        mask, confident = of_masks.get(key(group[0])), of_confidence.get(key(group[0]))
        pairs.views.append(
            ViewFiles(
                name,
                group[0],
                depth=same[0] if same else None,
                mask=mask[0] if mask else None,
                confidence=confident[0] if confident else None,
                confidence_levels=confidence_levels,
            )
        )
    used = {view.depth for view in pairs.views}
    pairs.unmatched_depth = [group[0] for group in depths.values() if used.isdisjoint(group)]
    return pairs


def by_name(pictures: Iterable[str]) -> dict[str, list[str]]:
    """Pictures by the name of their view: the stem, with the folders before it where stems are the same in several."""
    paths = sorted(set(pictures))
    folders: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folders[stem(path)].add(path.rpartition("/")[0])
    shared = any(len(names) > 1 for names in folders.values())
    start = len(_common_folder(paths)) if shared else 0

    def name(path: str) -> str:
        return "_".join([*path[start:].split("/")[:-1], stem(path)]) if shared else stem(path)

    return grouped_by(name, paths)


def grouped_by(key: Key, paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by their key, sorted."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path in sorted(set(paths)):
        groups[key(path)].append(path)
    return dict(groups)


def _common_folder(paths: Sequence[str]) -> str:
    """The folder that all paths are in, with a slash at its end."""
    shared = paths[0].split("/")[:-1]
    for path in paths:
        equal = [one == other for one, other in zip(shared, path.split("/")[:-1], strict=False)]
        shared = shared[: [*equal, False].index(False)]
    return "".join(f"{part}/" for part in shared)


def _depth_stem(view: str) -> str:
    return "depth_" + view.removeprefix("view_") if view.startswith("view_") else view
