"""Snapshots of EDM, EDM2 and ECT, read without running any code that they hold."""
from kit.layers import DTYPES
from kit.process import reading

import io
import math
import pickle
import re

import numpy as np
import torch


class Record:
    """What an object in a foreign pickle was: the name of its class, and its state. It has no behaviour."""

    def __init__(self, class_name="", state=None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state):
        self.state = state


class Unread(Record):
    """What a pickle makes with a name that is not read: nothing is imported or called, and the arguments are
    dropped. ECT's snapshots hold such objects beside the network, in loss_fn."""

    def __init__(self, *args, **kw):
        super().__init__(type(self).__name__)


class Array(np.ndarray):
    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        super().__setstate__((1, shape, number_type(dtype), fortran, raw))


def number_type(record):
    """NumPy's dtype from the Record of one. A pickle could set the flags of a true dtype, and then have raw
    bytes taken for an array of objects, that is, for pointers."""
    if not re.fullmatch(r"[biufc]\d+", record.class_name):
        raise pickle.UnpicklingError(f"it holds an array of {record.class_name}, not of numbers")
    return np.dtype((">" if record.state and record.state[1] == ">" else "<") + record.class_name)


def torch_storage(blob):
    """A tensor's flat storage. torch's own function would unpickle the blob without limits."""
    found = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=found.dtype).set_(found)


def torch_tensor(flat, offset, size, stride, *_):
    """A tensor on that storage. Strides of 0 could make terabytes of a small file; as_strided checks
    bounds."""
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError("it holds a tensor larger than its storage")
    return flat.as_strided(size, stride, offset)


# All that a foreign pickle may name. A persistent object brings its own code, which is dropped.
PICKLE_NAMES = {
    "torch_utils.persistence._reconstruct_persistent_obj":
        lambda meta: Record(meta["class_name"], meta["state"]),
    "dnnlib.util.EasyDict": dict, "collections.OrderedDict": dict,
    "builtins.set": set, "__builtin__.set": set,
    "torch.device": lambda *place: place,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, in protocol 2
    "numpy.ndarray": Record, "numpy.dtype": lambda code, *_: Record(code),
    "numpy.multiarray._reconstruct": lambda *_: Array(0),
    "numpy.multiarray.scalar": lambda dtype, raw: np.frombuffer(raw, number_type(dtype))[0],
    "numpy.numeric._frombuffer": lambda raw, dtype, shape, order:
        np.frombuffer(raw, number_type(dtype)).reshape(shape, order=order),
    "torch.storage._load_from_bytes": torch_storage,
    "torch._utils._rebuild_tensor_v2": torch_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{str(dtype): dtype for dtype in DTYPES.values()}}


class Unpickler(pickle._Unpickler):
    """Reads PICKLE_NAMES and Records, makes everything else Unread, and sets the state of Records and Arrays
    alone. It extends the unpickler written in Python, because C's cannot be kept from setting the state of
    anything."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        full = re.sub(r"^numpy\._?core\.", "numpy.", f"{module}.{name}")  # numpy 1 and 2
        if full in PICKLE_NAMES or module.startswith("torch.nn.modules."):
            return PICKLE_NAMES.get(full, Record)
        return type(full, (Unread,), {})

    def load_build(self):
        if not isinstance(self.stack[-2], (Record, Array)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_pickle(path):
    """What a foreign pickle (networks, statistics of EDM and EDM2) holds, without running code of its own."""
    with reading(f"cannot read {path}"), open(path, "rb") as file:
        return Unpickler(file).load()


def module_tensors(record, prefix="", seen=None):
    """The Record of a module -> {name: float32 tensor}, in the order in which they were defined. No module
    may occur twice: forty that each hold the next one twice would have 2^40 names."""
    seen = set() if seen is None else seen
    if id(record) in seen:
        raise ValueError(f"the module {prefix} occurs twice")
    seen.add(id(record))
    own = {**record.state["_parameters"], **record.state["_buffers"]}
    found = {prefix + k: v.float() for k, v in own.items() if v is not None}
    for name, child in record.state["_modules"].items():
        if child is not None:
            found |= module_tensors(child, f"{prefix}{name}.", seen)
    return found


POSTHOC = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"
PUBLISHED = {  # NVIDIA's names and where the files are, of lowest FID without guidance
    **{f"edm2-img512-{size}": f"{POSTHOC}/edm2-img512-{size}-{rest}.pkl" for size, rest in dict(
        s="2147483-0.130", m="2147483-0.100", l="1879048-0.085", xl="1342177-0.085",
        xxl="0939524-0.070").items()},
    **{f"edm2-img64-{size}": f"{POSTHOC}/edm2-img64-{size}-{rest}.pkl" for size, rest in dict(
        s="1073741-0.075", m="2147483-0.060", l="1073741-0.040", xl="0671088-0.040").items()},
    **{f"edm-cifar10-{kind}": f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-{kind}-vp.pkl"
       for kind in ("uncond", "cond")}}

EDM_FIXED = dict(  # what these networks could do otherwise and ours cannot
    edm2=dict(channel_mult_noise=None, channel_mult_emb=None, channels_per_head=64, label_balance=0.5,
              concat_balance=0.5, res_balance=0.3, attn_balance=0.3, clip_act=256, resample_filter=[1, 1]),
    ddpmpp=dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                decoder_type="standard", channel_mult_noise=1, channel_mult_emb=4, resample_filter=[1, 1]))
EDM_DEFAULTS = dict(
    edm2=dict(model_channels=192, num_blocks=3, channel_mult=(1, 2, 3, 4), attn_resolutions=(16, 8)),
    ddpmpp=dict(model_channels=128, num_blocks=4, channel_mult=(1, 2, 2, 2), attn_resolutions=(16,)))
EDM_NAMES = ((r"^(unet|model)\.", ""), (r"^(emb|map)_", r"embedding.\1_"),
             (r"^dec\.\d+x\d+_aux_(norm|conv)", r"out_\1"))  # theirs -> ours
EDM_DROPPED = "logvar|map_augment|resample_filter"  # the loss's head; augmentation labels, which are zero


def read_edm(path):
    """A snapshot of EDM2's U-Net, or of DDPM++ by EDM or ECT (a dict with `ema`), in the form of our
    checkpoints; the name of its class stands for the script. ECT's is a consistency model, which a script can
    sample that says how (Config.foreign). None of these networks was trained with dropped labels."""
    content = read_pickle(path)
    with reading(f"{path} is no snapshot of EDM2's U-Net, or of DDPM++ by EDM or ECT"):
        kind = content["ema"].class_name
        arch = dict(Precond="edm2", EDMPrecond="ddpmpp", ECMPrecond="ddpmpp")[kind]
        kw = EDM_DEFAULTS[arch] | content["ema"].state["_init_kwargs"]
        for name, value in EDM_FIXED[arch].items():
            if kw.get(name, value) != value:
                raise ValueError(f"{name} {kw[name]}")
        weights = {}
        for name, value in module_tensors(content["ema"]).items():
            if not re.search(EDM_DROPPED, name):
                for theirs, ours in EDM_NAMES:
                    name = re.sub(theirs, ours, name)
                weights[name] = value
        classes = kw.get("label_dim", 0)
        options = dict(arch=arch, channels=kw["model_channels"], blocks=kw["num_blocks"], double_norm=False,
                       channel_mult=tuple(kw["channel_mult"]), attention=tuple(kw["attn_resolutions"]),
                       emb="fourier" if arch == "edm2" else "positional", c_noise="log")
        shape = (kw["img_channels"], kw["img_resolution"], kw["img_resolution"])
    mode = "consistency" if kind == "ECMPrecond" else "diffusion"
    space = "edm2" if arch == "edm2" and shape[0] == 4 else ""
    config = options | dict(conditional=classes > 0, mode=mode, space=space, label_dropout=0.0)
    options |= dict(shape=shape, classes=classes, sigma_d=kw.get("sigma_data", 0.5), head=False)
    return dict(script=kind, foreign=True, config=config, options=options, net=weights, ema=weights, step=0,
                seconds=0.0)
