"""Who imports whom: the table below is the package, drawn from the bottom up."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minigrpo"

# A module imports those on its right and no others; all of them stand above it.
EDGES = {
    "config": "",
    "shapes": "",
    "distributed": "",
    "elementwise": "",
    "transformer": "elementwise",
    "hugging_face": "transformer",
    "grpo": "",
    "optim": "distributed transformer",
    "plots": "",
    "double_integrator": "shapes",
    "top_k": "",
    "policy": "top_k",
    "untruncated": "transformer top_k policy",
    "scoring": "transformer policy untruncated",
    "lora": "distributed transformer hugging_face",
    "runs": "distributed",
    "lqr": "shapes double_integrator",
    "prompts": "shapes double_integrator",
    "sampling": "shapes transformer top_k policy untruncated",
    "reward": "shapes double_integrator lqr",
    "tokenizer": "double_integrator prompts",
    "counterfactual": "shapes double_integrator lqr reward",
    "data": "shapes double_integrator lqr prompts tokenizer",
    "sft": "config distributed transformer optim policy scoring tokenizer data",
    "rollout": "config shapes counterfactual distributed transformer grpo optim double_integrator "
    "policy scoring lora prompts sampling reward tokenizer data",
    "memory": "config counterfactual distributed transformer scoring lora data rollout",
    "evaluation": "config shapes distributed transformer double_integrator policy lqr prompts "
    "reward data rollout",
    "update": "config distributed transformer grpo optim scoring rollout",
    "gradient_signal": "config distributed transformer memory runs reward data rollout update",
    "checkpoint": "config distributed transformer hugging_face double_integrator lora runs lqr "
    "prompts tokenizer data rollout",
    "training": "config distributed transformer lora optim runs tokenizer data evaluation "
    "checkpoint",
}

# Other people's packages have few doors; empty is any module. numpy is for scipy, plots and keys.
DOORS = {
    "argparse": "config",
    "safetensors": "hugging_face checkpoint",
    "tokenizers": "tokenizer",
    "jinja2": "tokenizer",  # which torch requires, and transformers for chat templates
    "transformers": "tokenizer data checkpoint",
    "huggingface_hub": "hugging_face",
    "scipy": "lqr",
    "numpy": "data evaluation rollout plots",
    "matplotlib": "plots",
    "tqdm": "runs gradient_signal",
    "einops": "",
    "torch": "",
}


def imports(path: Path) -> set[str]:
    """Dotted names of all imported modules, inside of functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner if node.module == "minigrpo" else {node.module}
    return found


def modules() -> dict[str, set[str]]:
    return {path.stem: imports(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_the_package_imports_itself_as_drawn() -> None:
    drawn = {name: set(edges.split()) for name, edges in EDGES.items()}
    start = "minigrpo."
    real = {
        name: {other.removeprefix(start) for other in found if other.startswith(start)}
        for name, found in modules().items()
    }
    assert real == drawn


def test_the_table_is_drawn_from_the_bottom_up() -> None:
    seen: set[str] = set()
    for name, edges in EDGES.items():
        assert set(edges.split()) <= seen, f"{name} imports what stands below it"
        seen.add(name)


def test_other_packages_come_in_by_their_doors() -> None:
    for name, found in modules().items():
        for package in {dotted.partition(".")[0] for dotted in found} - {"minigrpo"}:
            if package in DOORS:
                assert not DOORS[package] or name in DOORS[package].split(), f"{name}: {package}"
            else:
                assert package in sys.stdlib_module_names, f"{name}: {package} has no door"


def test_the_mathematics_needs_nothing_but_torch_and_einops() -> None:
    outside = {dotted.partition(".")[0] for dotted in modules()["grpo"]} - sys.stdlib_module_names
    assert outside == {"torch", "einops"}


def test_importing_the_package_does_nothing() -> None:
    assert (PACKAGE / "__init__.py").read_text() == ""


def test_plots_needs_matplotlib_only_when_it_draws() -> None:
    top = [node for node in ast.parse((PACKAGE / "plots.py").read_text()).body]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("matplotlib") for name in names)
