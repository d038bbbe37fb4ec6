"""The items of the tasks `python_stdlib` and `python_stdlib_order`, from the modules that training holds out.

Which modules these are, and their text, depends on the running Python: compare scores of one version only.
lm-eval calls both functions with the task's metadata, and with whatever its command line adds to it.
"""

import ast
import itertools

from datasets import Dataset

from hf_nvfp4.data import stdlib_documents

MODULES = 40
MODULE_BYTES = 4096
FUNCTIONS = 200
CONTEXT_CHARACTERS = 300
CONTINUATION_CHARACTERS = 100


def modules(**_metadata) -> dict[str, Dataset]:
    """The beginnings of up to MODULES held-out modules, as {"name", "text"}."""
    documents = stdlib_documents("validation")[:MODULES]
    return {"test": Dataset.from_list([{**document, "text": whole_lines(document["text"])} for document in documents])}


def whole_lines(text: str, size: int = MODULE_BYTES) -> str:
    """As many whole lines from the beginning of text as fit in size bytes of UTF-8."""
    start = text.encode()[:size].decode(errors="ignore")
    return text if start == text else start[: start.rfind("\n") + 1]


def continuations(**_metadata) -> dict[str, Dataset]:
    """Halved functions as {"context", "choices", "answer"}; FUNCTIONS of them, spread over all modules.

    The wrong choice is the second half of the function before, most often of the same module or class.
    Both have the same number of characters, so that length does not tell them apart.
    """
    texts = [document["text"] for document in stdlib_documents("validation")]
    halves = [half for text in texts for half in halved_functions(text)]
    pairs = [(half, before[1]) for before, half in itertools.pairwise(halves) if half[1] != before[1]]
    count = min(FUNCTIONS, len(pairs))
    chosen = [pairs[i * len(pairs) // count] for i in range(count)]
    return {"test": Dataset.from_list([item(*pair, answer=i % 2) for i, pair in enumerate(chosen)])}


def halved_functions(text: str) -> list[tuple[str, str]]:
    """(context, continuation) of every function in text that is long enough, cut in the middle by lines."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # an example for an older Python, say
        return []
    lines = text.splitlines(keepends=True)
    halves = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            middle = (node.lineno - 1 + node.end_lineno) // 2
            first, second = "".join(lines[node.lineno - 1 : middle]), "".join(lines[middle : node.end_lineno])
            continuation = second.lstrip()
            if first.strip() and len(continuation) >= CONTINUATION_CHARACTERS:
                context = first + second[: len(second) - len(continuation)]
                halves.append((context[-CONTEXT_CHARACTERS:], continuation[:CONTINUATION_CHARACTERS]))
    return halves


def item(half: tuple[str, str], wrong: str, answer: int) -> dict:
    """One multiple-choice item; answer: where the right choice stands."""
    context, right = half
    return {"context": context, "choices": [wrong, right] if answer else [right, wrong], "answer": answer}
