"""Published numbers, and a set's own beside them."""

# V-D4RL Table 5: mean, std, min, P25, median, P75, max of the episode returns.
TABLE_5 = {
    ("walker-walk", "random"): (42.3, 8.7, 30.0, 34.9, 41.3, 46.8, 74.6),
    ("walker-walk", "mixed"): (144.5, 155.9, 10.9, 44.3, 69.4, 162.4, 604.9),
    ("walker-walk", "medium"): (439.6, 48.4, 176.2, 423.1, 445.5, 466.7, 538.0),
    ("walker-walk", "medexp"): (704.1, 267.7, 176.2, 445.5, 538.0, 969.1, 990.6),
    ("walker-walk", "expert"): (969.8, 12.4, 909.2, 963.9, 969.1, 979.5, 990.6),
    ("cheetah-run", "random"): (6.6, 2.6, 1.1, 4.7, 6.3, 8.4, 16.3),
    ("cheetah-run", "mixed"): (191.2, 144.6, 2.5, 48.3, 191.9, 303.4, 473.8),
    ("cheetah-run", "medium"): (523.8, 25.5, 325.3, 509.1, 524.2, 538.3, 578.3),
    ("cheetah-run", "medexp"): (707.0, 184.9, 325.3, 524.2, 578.3, 894.1, 905.7),
    ("cheetah-run", "expert"): (891.1, 11.2, 843.0, 886.9, 894.2, 898.5, 905.7),
    ("humanoid-walk", "random"): (1.1, 0.8, 0.0, 0.5, 1.0, 1.5, 5.7),
    ("humanoid-walk", "mixed"): (275.7, 176.1, 0.0, 93.7, 341.7, 423.1, 529.0),
    ("humanoid-walk", "medium"): (573.0, 16.7, 526.5, 560.6, 572.9, 584.9, 609.4),
    ("humanoid-walk", "medexp"): (715.9, 146.1, 526.5, 572.9, 620.6, 877.4, 889.8),
    ("humanoid-walk", "expert"): (858.1, 42.4, 631.8, 846.4, 877.6, 885.5, 889.8),
}
# MOTO Table 1: mean return of the demonstrations, all of which succeed.
MOTO_TABLE_1 = {
    "metaworld-assembly": 36.0, "metaworld-bin-picking": 20.9, "metaworld-box-close": 25.3,
    "metaworld-coffee-push": 36.2, "metaworld-disassemble": 31.6, "metaworld-door-open": 15.2,
    "metaworld-drawer-open": 48.0, "metaworld-hammer": 63.3, "metaworld-plate-slide": 71.1,
    "metaworld-window-open": 60.5,
}  # fmt: skip


def standard_transitions(task: str, name: str) -> int:
    """The size of the published set (Table 5; demos: MOTO's, arXiv:2401.03306 Appendix C.2)."""
    mixed = {"cheetah-run": 200_000, "humanoid-walk": 600_000}.get(task, 100_000)
    return {"mixed": mixed, "medexp": 200_000, "ranexp": 200_000, "demos": 1_000}.get(name, 100_000)


def print_statistics(task: str, name: str, ours: dict[str, float], label: str, episodes: int) -> None:
    """ours: of store.return_statistics; label: how the set came about."""
    published = "MOTO's Table 1" if task in MOTO_TABLE_1 else "V-D4RL's Table 5"
    print(f"{task} {name}: {episodes:,} episodes, returns beside {published}")
    rows = {label: ours.values(), "paper": TABLE_5.get((task, name), ())}
    if name == "demos" and task in MOTO_TABLE_1:
        rows["paper"] = (MOTO_TABLE_1[task],)
    print(" " * 10 + "".join(f"{statistic:>8}" for statistic in ours))
    for row, numbers in rows.items():
        if numbers:
            print(f"{row:>10}" + "".join(f"{number:8.1f}" for number in numbers))
