"""One file per algorithm means copies. Same name, same source text: comments too, the number of a DIFF masked.

What differs by design is listed in VARIANTS, so that a new file has to say which version of a name it shares. A
researcher's own file, whose docstring says `Based on: drq_bc`, is left alone."""

import ast
import difflib
import re
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

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

FILES = {path.stem: path.read_text() for path in sorted((ROOT / "algos").glob("*.py"))}
OWN = {file for file, text in FILES.items() if "Based on:" in (ast.get_docstring(ast.parse(text)) or "")}
ALGORITHMS = {file: text for file, text in FILES.items() if file not in OWN}
EACH = pytest.mark.parametrize("file", ALGORITHMS)


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


def test_same_name_same_source_text():
    """Files that share a text are exactly a group of VARIANTS, or all files that have the name."""
    sources = defaultdict(lambda: defaultdict(list))  # name -> text -> its files
    for file, text in ALGORITHMS.items():
        for name, source in definitions(text).items():
            sources[name][source].append(file)
    assert ALGORITHMS.keys() >= FREE | MODEL and VARIANTS.keys() <= sources.keys()
    for name, texts in sources.items():
        groups = VARIANTS.get(name, [set().union(*texts.values())])
        first, *others = (source.splitlines() for source in texts)
        changes = ["\n".join(difflib.unified_diff(first, other, lineterm="")) for other in others]
        assert sorted(texts.values()) == sorted(map(sorted, groups)), "\n\n".join([name, *changes])


def test_common_holds_no_network_loss_optimiser_or_branch_on_the_algorithm():
    """No name, attribute or word in quotes of common.py is one of these."""
    nodes = list(ast.walk(ast.parse((ROOT / "common.py").read_text())))
    texts = [value for node in nodes for value in vars(node).values() if isinstance(value, str)]
    words = {word for text in texts for word in text.split(".")}
    assert not words & {"nn", "optim", "functional", "backward", "Module", "Optimizer", *ALGORITHMS}
    assert not [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.endswith("loss")]


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
    """algos -> common -> manipulation and variations, and these only inside functions."""
    ours = {path.stem for folder in (".", "algos", "data", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    ours |= {"data", "benchmarks", "algos"}
    parts = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in ("common", "manipulation", "variations")}
    assert [imports(tree) & ours for tree in parts.values()] == [{"manipulation", "variations"}, set(), set()]
    assert not imports(ast.Module([node for node in parts["common"].body if not hasattr(node, "name")])) & ours


@EACH
def test_files_import_common_alone_and_run_nothing(file):
    tree = ast.parse(ALGORITHMS[file])
    assert imports(tree) - set(sys.stdlib_module_names) == {"common", "numpy", "torch"}
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    table = re.compile(r"TUNED\[.*\] = ")  # a row of it
    runs = [ast.unparse(node) for node in tree.body[1:] if not isinstance(node, allowed)]
    assert ast.get_docstring(tree)
    assert [line for line in runs if not table.match(line)] == [
        "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))",
        "if __name__ == '__main__':\n    main(common.parse_args(Args, TUNED, QUICK))",
    ]


@EACH
def test_every_difference_of_the_header_is_marked_where_it_happens(file):
    text = ALGORITHMS[file]
    header, body = text.split('"""', 2)[1:]
    numbers = [int(number) for number in re.findall(r"^  DIFF (\d+):", header, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers
    assert {int(number) for number in re.findall(r"DIFF (\d+)", body)} == set(numbers)


@EACH
def test_files_have_the_same_order(file):
    text = ALGORITHMS[file]
    banners = [f"\n# ==== {name} ====\n" for name in ("Networks", "Agent", "Evaluation")]
    marks = ["\nclass Args:", "\nTUNED", "\nQUICK", *banners, "\ndef main(", "\nif __name__"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert all(text.count(banner) == 1 for banner in banners)
