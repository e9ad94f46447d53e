"""The model loader and the finder of artifact files."""

import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from gazeguard import lab
from gazeguard.artifacts import HEADS_FILE, find_file, push_folder
from gazeguard.errors import ArtifactError, InputError
from gazeguard.guard import GazeGuard
from gazeguard.loading import find_device, find_dtype, load


def test_the_lab_by_name_and_by_folder_is_one_model():
    model, processor = load("lab", device="cpu")
    again, _ = load(lab.checkpoint_path(), device="cpu")
    assert not model.training
    assert hasattr(processor, "image_processor")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_model_goes_to_the_device_in_the_dtype():
    """A meta tensor holds nothing, so that it stands for any other device here."""
    model, _ = load("lab", device="meta", dtype="bfloat16")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_device_map_is_handed_to_transformers(monkeypatch):
    """And the model is moved nowhere else."""
    given = {}
    model, _ = load("lab", device="cpu")
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda _, **options: given.update(options) or model)
    monkeypatch.setattr(model, "to", None)
    assert load("lab", device_map="auto")[0] is model
    assert given == {"dtype": "auto", "trust_remote_code": False, "device_map": "auto"}


@pytest.mark.parametrize(("gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_if_there_is_one(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert find_device("auto") == torch.device(expected)
    assert find_device("cuda:1") == torch.device("cuda", 1)


def test_dtypes_by_name():
    assert find_dtype("auto") == "auto"
    assert find_dtype("float16") is find_dtype(torch.float16) is torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "Unknown device 'gpu'; expected one of: auto, cpu"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'; expected one of: auto, bfloat16"),
        ({"dtype": "half-ish"}, "Unknown dtype 'half-ish'"),
        ({"device": "cpu", "device_map": "auto"}, "Both device 'cpu' and device_map 'auto' are given"),
        ({"model": "no/such/folder"}, "no/such/folder cannot be loaded as a vision-language model"),
    ],
)
def test_what_cannot_be_loaded_is_said(options, message):
    with pytest.raises(InputError, match=message):
        load(options.pop("model", "lab"), **options)


def test_a_missing_torchvision_is_said_with_what_to_install(monkeypatch):
    """Qwen-VL's processors need it, which transformers says in five lines of its inside."""
    inner = "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check out\n"

    def refuse(*_, **__):
        raise ImportError(inner)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(InputError) as caught:
        load("lab", device="cpu")
    assert str(caught.value) == (
        "The processor of lab needs torchvision, which is not installed. Install it: pip install '.[vision]' in a "
        "checkout of GazeGuard."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(InputError, match="cannot be moved to device 'cuda'"):
        load("lab", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_loads_onto_the_gpu():
    model, _ = load("lab", dtype="bfloat16")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_files_are_found_in_folders_and_as_themselves(tmp_path):
    file = tmp_path / HEADS_FILE
    with pytest.raises(ArtifactError, match=r"There is no heads\.json in the folder"):
        find_file(tmp_path, HEADS_FILE)
    file.write_text("{}")
    assert find_file(tmp_path, HEADS_FILE) == find_file(file, HEADS_FILE) == file
    assert find_file("nowhere.json", HEADS_FILE).name == "nowhere.json"


def test_files_are_found_in_the_cache_of_the_hub(tmp_path):
    kept = tmp_path / "models--me--mine"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc" / HEADS_FILE).write_text("{}")
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    assert find_file("me/mine", HEADS_FILE, **offline).read_text() == "{}"
    with pytest.raises(ArtifactError, match=r"no heads\.json from the hub's repository"):
        find_file("me/other", HEADS_FILE, **offline)


def test_a_folder_is_pushed():
    """The hub's client gets what was written, and the options."""

    class Api:
        def create_repo(self, repo_id, exist_ok):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **options):
            with open(f"{folder_path}/file") as file:
                return f"{repo_id} {file.read()} {options}"

    pushed = push_folder(lambda folder: (folder / "file").write_text("text"), "mine", api=Api(), create_pr=True)
    assert pushed == "me/mine text {'create_pr': True}"


OWN = """
from transformers import AutoProcessor

def make(model):
    processor = AutoProcessor.from_pretrained(model)
    processor.image_processor.image_mean = [0.25] * 3
    return processor

def broken(model):
    return 1 / 0

class nest:
    ready = make(%r)
"""


@pytest.mark.parametrize("attribute", ["make", "nest.ready"])
def test_a_processor_of_ones_own_is_imported_from_the_working_directory(tmp_path, monkeypatch, attribute):
    name = f"own_{attribute.replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN % str(lab.checkpoint_path()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    _, processor = load("lab", device="cpu", processor=f"{name}:{attribute}")
    assert processor.image_processor.image_mean == [0.25] * 3
    guard = GazeGuard.from_pretrained("lab", device="cpu", processor=f"{name}:{attribute}")
    assert guard.processor.image_processor.image_mean == [0.25] * 3
    with pytest.raises(InputError, match=rf"The processor {name}:broken cannot be imported: ZeroDivisionError"):
        load("lab", processor=f"{name}:broken")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json", "The processor is 'json'; expected module:attribute"),
        ("no_such_module:processor", "cannot be imported: ModuleNotFoundError"),
        ("json:nothing", "cannot be imported: AttributeError.*Give module:attribute"),
        ("json:decoder", "module is not a vision-language processor: it has no tokenizer and no image_processor"),
        ("string:digits", "str is not a vision-language processor: it has no tokenizer"),
    ],
)
def test_a_processor_that_cannot_be_imported_is_said(name, message):
    with pytest.raises(InputError, match=message):
        load("lab", processor=name)
