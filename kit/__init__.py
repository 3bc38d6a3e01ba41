"""The machinery around a method: data, networks, teachers, runs, reports. `kit.x` means "skip this, it is
machinery"; `common.x` means "read this, it is the paper".

Each file has one subject and imports only files below it:

    reference   what eval.py compares images with: folders, zips, files of statistics
    report      pictures, the report at the end of training, --sample and --export
    metrics     distances and scores
    features    networks that judge images, for eval.py
    run         one training run: optimizer, averages, log, save, resume; the forecast of memory
    config      the shared flags, the presets of the datasets, the command line
    teachers    checkpoints -> networks
    edm         snapshots of EDM, EDM2 and ECT
    text        networks that predict eps or v; text-to-image pipelines with LoRA and captions
    data        images and latents on disk
    store       rows on disk, made once and read in place
    toys        mixtures of Gaussians, drawn shapes
    networks    an MLP, and a U-Net with EDM2's or DDPM++'s blocks
    layers      what they are made of, with rules for the JVP
    attention   attention with a JVP
    process     processes, errors of one line, files, locks, downloads

These names are for scripts, and for your own code:
"""
from kit.config import (
    EDM2_NET,
    EDM2_TEACHERS,
    Config,
    call,
    dataset,
    fixed,
    flag,
    opens,
    parse_args,
    to_pixels,
)
from kit.data import read_image
from kit.features import lpips_network
from kit.layers import normalize_weights
from kit.metrics import distance
from kit.process import RANK, WORLD, fail, reading
from kit.report import export, lines, noise_and_labels, panels, place, report, write_samples
from kit.run import Run, check_out, dry_run, lerp, make_optimizer
from kit.teachers import init_path, load_net, load_teacher, network, read_checkpoint
from kit.text import Epsilon
