"""One file per algorithm means copies. Same name, same source text: comments too, the number of a DIFF masked.

What differs by design is listed in VARIANTS, so that a new file has to say which version of a name it shares. A
researcher's own file, whose docstring says `Based on: drq_bc`, has its differences printed and never fails."""

import ast
import difflib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(common.__file__).resolve().parent

# name -> groups of files; the text is equal within a group and differs from group to group
FREE, MODEL = {"bc", "drq_bc", "cql"}, {"offline_dv2", "lompo", "moto"}  # model-free files, world models
CATEGORICAL = {"offline_dv2", "moto"}
VARIANTS = {
    # which networks there are, and which optimiser trains which: the algorithm itself
    "Agent.__init__": [{"bc"}, {"drq_bc", "cql"}, {"offline_dv2"}, {"lompo"}, {"moto"}],
    # CQL adds the conservative term and values 31 actions for it; Offline DV2's has lambda-returns
    "Agent.critic_loss": [{"drq_bc"}, {"cql"}, {"offline_dv2"}, {"lompo"}, {"moto"}],
    # BC trains its encoder through it, DrQ+BC gets an embedding without gradient and adds Q, CQL has Q alone
    "Agent.actor_loss": [{"bc"}, {"drq_bc"}, {"cql"}, {"offline_dv2"}, {"lompo"}, {"moto"}],
    # the order of one update: BC has one step, the others step critic, actor and target
    "Agent.update": [{"bc"}, {"drq_bc", "cql"}, {"moto"}],
    # DrQ-v2's networks and initialisation on one side, DreamerV2's (Keras's) on the other
    "Actor": [FREE, CATEGORICAL],
    # LOMPO also has a GRU of Keras's to begin, and ReLU in its convolutions
    "init_weights": [FREE, CATEGORICAL, {"lompo"}],
    "Encoder": [FREE, CATEGORICAL, {"lompo"}],
    "Decoder": [CATEGORICAL, {"lompo"}],
    # categoricals with balanced KL, a LayerNorm GRU and deep heads; normals with a plain KL
    "RSSM": [CATEGORICAL, {"lompo"}],
    "WorldModel": [CATEGORICAL, {"lompo"}],
    # MOTO's loss returns states, too
    "Agent.model_loss": [{"offline_dv2"}, {"lompo"}, {"moto"}],
    # imagination is within the update there, in a buffer here
    "Agent.update_agent": [{"offline_dv2"}, {"lompo"}],
    # what the members disagree about: class probabilities, log probabilities, logits
    "Agent.penalty": [{"offline_dv2"}, {"lompo"}, {"moto"}],
    # MOTO values the last state's action, too
    "Agent.imagine": [{"offline_dv2"}, {"moto"}],
    # the world models' reports the norm it clips
    "Agent.minimize": [FREE, MODEL],
    # a stack of frames is the state; a filter carries it from image to image; MOTO may draw its actions
    "Agent.act": [FREE, {"offline_dv2"}, {"lompo"}, {"moto"}],
    # MOTO's plays by the function that collects its episodes
    "evaluate": [FREE, {"offline_dv2", "lompo"}, {"moto"}],
    "evaluate_run": [FREE, MODEL],
}

BANNERS = ["# ==== Networks ====", "# ==== Agent ====", "# ==== Evaluation ===="]


def repository_files() -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted((ROOT / "algos").glob("*.py"))}


def based_on(text: str) -> str | None:
    found = re.search(r"Based on: *(\w+)", ast.get_docstring(ast.parse(text)) or "")
    return found[1] if found else None


def own_files() -> list[str]:
    return [file for file, text in repository_files().items() if based_on(text) is None]


def definitions(text: str) -> dict[str, str]:
    """Functions, classes, and Agent's methods as "Agent.x" -> source, decorators and last comment included."""
    lines, found = text.splitlines(), {}

    def add(name, node):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        found[name] = re.sub(r"DIFF \d+", "DIFF n", "\n".join(lines[first - 1 : node.end_lineno]))

    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Agent":
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    add(f"Agent.{method.name}", method)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in {"Args", "main"}:
            add(node.name, node)
    return found


def diff(one: str, one_text: str, two: str, two_text: str) -> str:
    return "\n".join(difflib.unified_diff(one_text.splitlines(), two_text.splitlines(), one, two, lineterm=""))


def problems(files: dict[str, str], variants: dict[str, list[set[str]]]) -> list[str]:
    """files: name -> source text. What breaks "same name, same source text", one text each; empty if nothing does."""
    sources: dict[str, dict[str, str]] = {}  # definition -> file -> text
    for file, text in files.items():
        if based_on(text) is None:
            for name, source in definitions(text).items():
                sources.setdefault(name, {})[file] = source
    found = []
    for name, by_file in sources.items():
        groups = variants.get(name, [set(by_file)])
        silent = by_file.keys() - set().union(*groups)
        found += [f"{name}: VARIANTS does not say which files {file} shares it with" for file in sorted(silent)]
        for group in groups:
            first, *others = sorted(group & by_file.keys()) or [None]
            changed = [file for file in others if by_file[file] != by_file[first]]
            found += [f"{name} differs:\n{diff(first, by_file[first], file, by_file[file])}" for file in changed]
    for name, groups in variants.items():
        by_file = sources.get(name, {})
        gone = set().union(*groups) - by_file.keys()
        found += [f"{name}: stale entry of VARIANTS, {file} has no such name" for file in sorted(gone)]
        texts = [by_file[min(group & by_file.keys())] for group in groups if group & by_file.keys()]
        if len(set(texts)) < len(groups):
            found.append(f"{name}: stale entry of VARIANTS, two of its groups have the same text")
    return found


def test_same_name_same_source_text():
    files = repository_files()
    assert files.keys() >= FREE | MODEL
    assert not problems(files, VARIANTS), "\n\n".join(problems(files, VARIANTS))


def test_differences_of_files_based_on_another_are_printed():
    """pytest -s tests/test_same_code.py shows them."""
    files = repository_files()
    for file, text in files.items():
        if (base := based_on(text)) in files:
            ours, theirs = definitions(text), definitions(files[base])
            for name in sorted(ours.keys() & theirs.keys()):
                if ours[name] != theirs[name]:
                    print(diff(f"{base}.{name}", theirs[name], f"{file}.{name}", ours[name]))


ONE = '''"""One."""
class Agent:
    @decorated(1)
    def act(self):
        """Acts."""
        return 1  # DIFF 3

def helper(x):
    return x  # what it was
'''


def test_what_differs_is_found():
    assert problems({"one": ONE, "two": ONE.replace("DIFF 3", "DIFF 12")}, {}) == []  # each file numbers its own
    changes = [("helper", "return x", "return  x"), ("helper", "it was", "it is"), ("Agent.act", "Acts.", "Acts!")]
    for name, before, after in [*changes, ("Agent.act", "decorated(1)", "decorated(2)")]:
        files = {"one": ONE, "two": ONE.replace(before, after)}
        (problem,) = problems(files, {})
        assert problem.startswith(f"{name} differs:")
        assert problems(files, {name: [{"one"}, {"two"}]}) == []
        (problem,) = problems(files | {"three": ONE}, {name: [{"one"}, {"two"}]})
        assert problem == f"{name}: VARIANTS does not say which files three shares it with"
        files["two"] = files["two"].replace("One.", "Mine. Based on: one")
        assert problems(files, {}) == []  # a file that is based on another
    for stale in ({"helper": [{"one"}, {"two"}]}, {"helper": [{"one", "two", "gone"}]}, {"gone": [{"one"}, {"two"}]}):
        assert any("stale" in problem for problem in problems({"one": ONE, "two": ONE}, stale))


# ---- what common.py may not hold, and what each file may import ----


def forbidden(text: str, algorithms: set[str]) -> list[str]:
    """Networks, losses, optimisers and branches on the algorithm in a source text, as "line: what"."""
    found = []

    def constants(node):
        return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}

    def words(node):
        return {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)} - {None}

    for node in ast.walk(ast.parse(text)):
        bad = None
        if isinstance(node, ast.ClassDef) and any(words(base) & {"Module", "Optimizer"} for base in node.bases):
            bad = f"class {node.name} is a network or an optimiser"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            modules = {part for name in names for part in name.split(".")}
            if modules & {"nn", "optim", "functional"}:
                bad = "imports networks, losses or optimisers"
        elif isinstance(node, ast.Attribute) and node.attr in {"nn", "optim", "backward"}:
            bad = f"uses .{node.attr}"
        elif isinstance(node, ast.FunctionDef) and node.name.endswith("loss"):
            bad = f"defines {node.name}"
        elif isinstance(node, ast.Compare | ast.MatchValue) and constants(node) & algorithms:
            bad = "branches on the algorithm"
        if bad:
            found.append(f"{node.lineno}: {bad}")
    return found


def test_common_holds_no_network_loss_optimiser_or_branch_on_the_algorithm():
    assert forbidden((ROOT / "common.py").read_text(), set(repository_files())) == []
    for _, value in inspect.getmembers(common, inspect.isclass):
        assert not issubclass(value, torch.nn.Module | torch.optim.Optimizer)


def test_the_search_of_common_finds():
    for text in ("class Net(torch.nn.Module): pass", "from torch import nn", "import torch.nn.functional as F",
                 "x = torch.optim.Adam([])", "loss.backward()", "def td_loss(q): pass",
                 "if run.algo in ('bc', 'y'): pass", "if name == 'drq_bc': pass"):  # fmt: skip
        assert len(forbidden(text, {"bc", "drq_bc"})) >= 1


def imports(tree: ast.AST) -> set[str]:
    """Names of modules, up to their first dot."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def test_arrows_point_one_way():
    """algos -> common -> manipulation, and that only inside make_env."""
    ours = {path.stem for folder in (".", "algos", "data", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    ours |= {"data", "benchmarks", "algos"}
    common_tree, manipulation = (ast.parse((ROOT / f"{name}.py").read_text()) for name in ("common", "manipulation"))
    assert imports(manipulation) & ours == set()
    assert imports(common_tree) & ours == {"manipulation"}
    within = [node.name for node in common_tree.body if "manipulation" in imports(node) and hasattr(node, "name")]
    assert within == ["make_env"]


@pytest.mark.parametrize("file", own_files())
def test_files_import_common_alone_and_run_nothing(file):
    tree = ast.parse(repository_files()[file])
    assert imports(tree) - set(sys.stdlib_module_names) == {"common", "numpy", "torch"}
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    table = re.compile(r"TUNED\[.*\] = ")  # a row of it
    runs = [ast.unparse(node) for node in tree.body[1:] if not isinstance(node, allowed)]
    assert ast.get_docstring(tree)
    assert [line for line in runs if not table.match(line)] == [
        "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))",
        "if __name__ == '__main__':\n    main(common.parse_args(Args, TUNED, QUICK))",
    ]


@pytest.mark.parametrize("file", own_files())
def test_every_difference_of_the_header_is_marked_where_it_happens(file):
    text = repository_files()[file]
    header, body = text.split('"""', 2)[1:]
    numbers = [int(number) for number in re.findall(r"^  DIFF (\d+):", header, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers
    assert {int(number) for number in re.findall(r"DIFF (\d+)", body)} == set(numbers)


@pytest.mark.parametrize("file", own_files())
def test_files_have_the_same_order(file):
    text = repository_files()[file]
    marks = ["class Args:", "\nTUNED", "\nQUICK", "\nSIZE = ", *BANNERS, "\ndef main(", "\nif __name__"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert all(text.count(banner) == 1 for banner in BANNERS)
