"""kit/data.py: images and latents on disk, how they become x0 and pixels again, and how they are kept."""
import common
import kit
import scm
from conftest import draw_pictures, fails, two_processes

import dataclasses
import io
import json
import tarfile
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image


def test_folder_and_zip_are_the_same_images(folder):
    """Class subfolders, and EDM's zip with dataset.json, give the same pixels and labels."""
    with zipfile.ZipFile("edm.zip", "w") as archive:
        names = sorted(folder.rglob("*.png"), key=lambda p: str(p.relative_to(folder)))
        labels = []
        for i, path in enumerate(names):
            archive.write(path, f"00000/img{i:08d}.png")
            labels.append([f"00000/img{i:08d}.png", "abc".index(path.parent.name)])
        archive.writestr("dataset.json", json.dumps(dict(labels=labels)))
    a, la, *_ = kit.data.image_folder(scm.Config(dataset="folder", data=str(folder)))
    b, lb, *_ = kit.data.image_folder(scm.Config(dataset="folder", data="edm.zip"))
    assert a.shape == (24, 3, 8, 8) and np.array_equal(a, b) and np.array_equal(la, lb)
    assert np.array_equal(a[0], np.asarray(Image.open(names[0])).transpose(2, 0, 1))
    small, *_ = kit.data.image_folder(scm.Config(dataset="folder", data=str(folder), image_size=4))
    assert np.abs(small[:].mean((2, 3)) - a[:].mean((2, 3))).max() < 1  # box halving keeps the mean


def test_centre_crop_keeps_the_middle():
    """A bright square in the middle of a wide dark picture fills the crop."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 200
    assert np.asarray(kit.data.centre_crop(Image.fromarray(picture), 16)).min() > 150


def test_cifar10_binary_archive():
    """Records of 1 label byte and 3072 plane bytes, batches in order."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 3073), dtype=np.uint8)
    rows[:, 0] = [3, 1, 4, 1, 5, 9]
    with tarfile.open("cifar.tar.gz", "w:gz") as archive:
        for i, name in [(1, "data_batch_2.bin"), (0, "data_batch_1.bin"), (2, "test_batch.bin")]:
            blob = rows[2 * i:2 * i + 2].tobytes()
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    images, labels, names, _ = kit.data.cifar10(scm.Config(dataset="cifar10", data="cifar.tar.gz"))
    assert np.array_equal(images[:].reshape(4, -1), rows[:4, 1:]) and list(labels) == [3, 1, 4, 1]


def test_images_go_to_unit_range_and_back(folder):
    """x0 is in [-1, 1], to_uint8 gives the stored pixels, and labels are dropped at their rate."""
    cfg = scm.Config(dataset="folder", data=str(folder), conditional=True, label_dropout=0.25)
    data = kit.dataset(cfg)
    x0, y = data.batch(common.Draw(0, 0, 0, 2000))
    assert x0.dtype == torch.float32 and x0.min() >= -1 and x0.max() <= 1
    stored = {row.tobytes() for row in data.rows}
    assert {image.tobytes() for image in kit.data.to_uint8(x0[:50]).numpy()} <= stored
    assert (y == -1).float().mean() == pytest.approx(0.25, abs=0.05) and set(y.tolist()) == {-1, 0, 1, 2}


def test_flips_are_half_and_follow_the_position(folder):
    """Each image comes as it is or mirrored, half the time; which one depends on (seed, step, position)."""
    cfg = scm.Config(dataset="folder", data=str(folder), flip=True)
    plain, flipped = (kit.dataset(dataclasses.replace(cfg, flip=flip)) for flip in (False, True))

    def batch(data, lo, hi, step=3):
        return data.batch(common.Draw(0, step, lo, hi))[0]

    a, b = batch(plain, 0, 4096), batch(flipped, 0, 4096)
    same, mirrored = ((b == v).flatten(1).all(1) for v in (a, a.flip(3)))
    assert (same | mirrored).all() and abs(mirrored.double().mean() - 0.5) < 4 * 0.5 / 64
    assert torch.equal(batch(flipped, 100, 200), b[100:200])
    assert not torch.equal(batch(flipped, 0, 4096, 4), b)
    assert (b.mean(0) - b.flip(3).mean(0)).abs().max() < 0.1 * a.std()  # its own mirror image, on average


def test_label_dropout_rate():
    """A tenth of the labels become -1, within four standard deviations of the binomial."""
    n = 20_000
    cfg = scm.Config(conditional=True, label_dropout=0.1)
    y = common.Draw(0, 0, 0, n).labels(torch.ones(n, dtype=torch.int64), cfg)
    assert abs((y == -1).double().mean() - 0.1) < 4 * (0.09 / n) ** 0.5 and set(y.tolist()) == {-1, 1}


def latents(data="", **kw):
    """The dataset of latents; from a folder of images, it is encoded into data/imagenet512 first."""
    values = dict(vae="vae", image_size=16, conditional=True) | kw
    return kit.dataset(scm.Config(dataset="imagenet512", data=str(data), **values))


def test_latents_are_the_autoencoders(folder, vae):
    """Mean and deviation in float16, of pixels in [-1, 1]; samples are normalized by the paper's numbers."""
    data, net = latents(folder), diffusers.AutoencoderKL.from_pretrained("vae")
    names, labels, read, _ = kit.data.list_images(folder)
    x = torch.from_numpy(np.stack([kit.data.decode(name, read, 16) for name in names])).float() / 127.5 - 1
    with torch.no_grad():
        posterior = net.encode(x).latent_dist
    found = torch.from_numpy(np.array(data.rows)).float()
    assert torch.allclose(found[:, :4], posterior.mean, atol=1e-2)
    assert torch.allclose(found[:, 4:], posterior.std, rtol=1e-2)
    assert data.shape == (4, 8, 8) and data.labels.tolist() == list(labels)
    assert data.cfg.data == "data/imagenet512"
    x0, y = latents().batch(common.Draw(0, 0, 0, 64))  # without --data, what is there
    gen = common.Draw(0, 0, 0, 64)
    mean, std = found[gen.index(24)].chunk(2, 1)
    z = mean + std * gen.normal(4, 8, 8)
    shift, scale = (torch.tensor(v).view(4, 1, 1)
                    for v in ([1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31]))
    assert torch.allclose(x0, (z - shift) * 0.5 / scale, atol=1e-6) and len(y) == 64
    means = data.x0(data.fetch(slice(None)).float())
    assert torch.allclose(means, (found[:, :4] - shift) * 0.5 / scale, atol=1e-6)


def test_decoding_undoes_the_normalization(vae):
    """x0 -> latent -> pixels, for our latents (pixels in [-1, 1], rounded) and for EDM2's (in [0, 1],
    cut)."""
    z, net = 3 * torch.randn(2, 4, 8, 8), diffusers.AutoencoderKL.from_pretrained("vae")
    with torch.no_grad():
        pixels = net.decode(z).sample
    for space, (low, high), half in (("signed", (-1, 1), 0.5), ("edm2", (0, 1), 0.0)):
        cfg = scm.Config(dataset="imagenet512", space=space, vae="vae")
        _, shift, scale = kit.data.latent_space(cfg, "cpu")
        found = kit.to_pixels((z - shift) * 0.5 / scale, cfg)
        expected = ((pixels - low) / (high - low) * 255 + half).clamp(0, 255).floor()
        assert (found != expected).double().mean() < 1e-3  # but for float32 at the steps


def test_edm2s_zip_of_latents(vae):
    """float32 (8, h, w) .npy and dataset.json, normalized by EDM2's numbers; read in place, not copied."""
    rows = np.random.default_rng(0).normal(size=(6, 8, 4, 4)).astype(np.float32)
    with zipfile.ZipFile("edm2.zip", "w") as archive:
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(6)]
        for name, row in zip(names, rows):
            buffer = io.BytesIO()
            np.save(buffer, row)
            archive.writestr(name, buffer.getvalue())
        table = [[name, i % 3] for i, name in enumerate(names)]
        archive.writestr("dataset.json", json.dumps(dict(labels=table)))
    data = latents("edm2.zip")
    assert np.array_equal(data.rows[[4, 1]], rows[[4, 1]]) and data.shape == (4, 4, 4) and data.classes == 3
    shift, scale = (torch.tensor(v).view(4, 1, 1)
                    for v in ([5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]))
    means, labels = data.x0(data.fetch(slice(None)).float()), data.labels
    assert torch.allclose(means, (torch.from_numpy(rows[:, :4]) - shift) * 0.5 / scale, atol=1e-6)
    assert labels.tolist() == [0, 1, 2] * 2 and not Path("data").exists()


def test_unfit_latents_are_refused(folder, vae, capsys):
    """No images or no latents; another size than before; a folder that cannot be written; latents without
    labels, or of a size that the network cannot halve."""
    for data, word in (("nowhere", "--data nowhere"), ("", "--data")):
        assert word in fails(capsys, latents, data)
    Path("data").write_text("in the way")
    assert "cannot write data" in fails(capsys, latents, folder)
    Path("data").unlink()
    latents(folder)
    assert "halved" in fails(capsys, latents, channel_mult=(1,) * 6)
    assert "other images" in fails(capsys, latents, folder, image_size=8)
    with zipfile.ZipFile("plain.zip", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((8, 4, 4), np.float32))
        archive.writestr("0.npy", buffer.getvalue())
    assert "labels" in fails(capsys, latents, "plain.zip")


def dies(monkeypatch, count):
    """From now on, the program is interrupted when it decodes its count-th image."""
    real, seen = kit.data.decode, []

    def decode(*args):
        seen.append(args[0])
        if len(seen) == count:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(kit.data, "decode", decode)
    return seen


def test_encoding_goes_on_after_a_kill(folder, vae, monkeypatch, capsys):
    """Unfinished latents are not read; two processes go on with them, and do nothing twice; damaged ones are
    encoded anew where the images are given."""
    monkeypatch.setattr(kit.store, "PART", 8)
    whole = np.array(latents(folder).rows)
    Path("data").rename("elsewhere")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies(patch, 20)
        latents(folder)
    parts = [Path(f"data/imagenet512/rows-0000{k}.npy") for k in range(3)]
    assert [path.exists() for path in parts] == [True, True, False]
    assert "--data data/imagenet512" in fails(capsys, latents)
    np.save(parts[0], 0 * np.load(parts[0]) + 7)  # a mark: these count as done
    parts[1].unlink()
    for rank in (0, 1):  # parts 0 and 2, then part 1
        with monkeypatch.context() as patch:
            patch.setattr(kit.store, "share", lambda: (rank, 2))
            fails(capsys, latents, folder) if rank == 0 else latents(folder)  # rank 0 waits for nobody here
        assert [path.exists() for path in parts] == [True, rank == 1, True]
    found = np.array(latents().rows)
    assert np.array_equal(found[8:], whole[8:]) and (found[:8] == 7).all()
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    assert "--data data/imagenet512" in fails(capsys, latents)
    assert np.array_equal(latents(folder).rows, whole)


def test_pixels_are_kept_by_all_processes(tmp_path, monkeypatch):
    """The cache of a folder: two processes write what one does. A killed writer goes on where it stopped, and
    a damaged cache is made anew."""
    root = draw_pictures(tmp_path / "many", 1400)  # two files, one of each process
    two_processes("scm", "--dataset", "folder", "--data", root, "--mode", "sct", "--steps", 1, "--batch", 8,
                  "--channels", 8, "--channel_mult", "1,1", "--blocks", 1)
    cfg, (two,) = scm.Config(dataset="folder", data=str(root)), Path("data/cache").iterdir()
    seen = dies(monkeypatch, 10**9)
    rows, *_ = kit.data.image_folder(cfg)
    assert len(seen) < 5 and len(rows) == 1400  # nothing is decoded again, but for a first look

    Path("one").mkdir()
    monkeypatch.chdir("one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies(patch, 1100)
        kit.data.image_folder(cfg)
    (one,) = Path("data/cache").iterdir()
    assert one.name == two.name and [path.name for path in one.glob("rows*")] == ["rows-00000.npy"]
    seen.clear()
    kit.data.image_folder(cfg)
    assert len(seen) < 400
    for name in ("rows-00000.npy", "rows-00001.npy", "labels.npy"):
        assert (one / name).read_bytes() == (tmp_path / two / name).read_bytes()
    (one / "rows-00001.npy").write_bytes((one / "rows-00001.npy").read_bytes()[:-1000])
    again, labels, *_ = kit.data.image_folder(cfg)
    assert np.array_equal(again, rows) and np.bincount(labels).tolist() == [467, 467, 466]


def test_rows_in_files_are_one_array(tmp_path):
    """Slices, numbers in any order and -1 find the rows of one numpy array; so does the one file of earlier
    versions."""
    rows = np.random.default_rng(0).integers(0, 256, (2500, 2, 3), np.uint8)

    def prepare():
        return np.arange(2500), np.zeros(2500), lambda part: rows[part], []
    found, *_ = kit.store.open_store(tmp_path / "parts", prepare, dict(sources="here"))
    for index in (slice(5, 1030), [2499, 0, 1024, 0], [-1], -1, 1500):
        assert np.array_equal(found[index], rows[index])
    assert found.shape == rows.shape and len(found) == 2500 and np.array_equal(found, rows)
    for path in (tmp_path / "parts").glob("rows*"):
        path.unlink()
    np.save(tmp_path / "parts/rows.npy", rows)
    np.save(tmp_path / "parts/done.npy", np.ones(2500, np.uint8))
    old, *_ = kit.store.open_store(tmp_path / "parts", lambda: pytest.fail("made anew"), dict(sources="here"))
    assert np.array_equal(old, rows)


def test_the_next_batch_is_read_ahead(folder):
    """What a thread has read is what batch() would have read, also if others are drawn in between."""
    cfg = scm.Config(dataset="folder", data=str(folder), conditional=True, label_dropout=0.5, flip=True)
    plain, ahead = kit.dataset(cfg), kit.dataset(cfg)
    ahead.following = lambda seed, step, lo, hi: (seed, step + 1, lo, hi) if step < 9 else None
    for step in (0, 1, 99, 2, 3):
        for a, b in zip(plain.batch(common.Draw(0, step, 4, 12)), ahead.batch(common.Draw(0, step, 4, 12))):
            assert torch.equal(a, b)
    assert list(ahead.ahead) == [(0, 4, 4, 12)]


def test_dry_run_encodes_nothing(folder, vae, monkeypatch, capsys):
    """Of latents that are not there yet, --dry_run knows shape and classes without encoding an image, of
    pictures from the first of them, and leaves nothing behind."""
    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", lambda *_: pytest.fail("encoded"))
    seen = dies(monkeypatch, 5)  # of 24
    small = ["--mode", "diffusion", "--channels", "8", "--channel_mult", "1,1", "--dry_run", "--data", folder]
    for words in (["imagenet512", "--vae", "vae", "--image_size", "16"], ["folder"]):
        scm.main(["--dataset", *map(str, [*words, *small])])
    shown = capsys.readouterr().out
    assert "(4, 8, 8), 3 classes" in shown and "(3, 8, 8), 3 classes" in shown
    assert len(seen) < 5 and not Path("data").exists() and not Path("out").exists()


def test_links_to_folders_are_followed_and_loops_end(folder, monkeypatch):
    """A class folder may be a symbolic link; one that leads back up is left out."""
    linked = Path("linked").absolute()
    linked.mkdir()
    for name, target in (("a", folder / "a"), ("b", folder / "b"), ("loop", linked)):
        (linked / name).symlink_to(target)
    names, labels, _, _ = kit.data.list_images(linked)
    assert len(names) == 16 and labels.tolist() == [0] * 8 + [1] * 8
    monkeypatch.chdir(folder)
    assert len(kit.data.list_images(Path("."))[0]) == 24


def test_latents_for_edm2s_networks(folder, vae, capsys):
    """--space edm2 encodes pixels in [0, 1], normalized by EDM2's numbers, into a folder of its own. A store
    says which it holds, and the other is refused."""
    data, net = latents(folder, space="edm2"), diffusers.AutoencoderKL.from_pretrained("vae")
    names, _, read, _ = kit.data.list_images(folder)
    x = torch.from_numpy(np.stack([kit.data.decode(name, read, 16) for name in names])).float() / 255
    with torch.no_grad():
        mean = net.encode(x).latent_dist.mean
    shift, scale = (torch.tensor(v).view(4, 1, 1)
                    for v in ([5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]))
    assert torch.allclose(data.x0(data.fetch(slice(None)).float()), (mean - shift) * 0.5 / scale, atol=1e-3)
    assert data.space == data.cfg.space == "edm2" and data.cfg.data == "data/imagenet512-edm2"
    assert latents("data/imagenet512-edm2").space == "edm2" and latents(folder).space == "signed"
    line = fails(capsys, latents, "data/imagenet512", space="edm2")
    assert "signed" in line and "edm2" in line and "--data IMAGES" in line


def test_edms_folder_is_its_zip(folder):
    """Shard folders with a dataset.json at their root: the classes are its numbers, not the shards."""
    root = Path("edm")
    table = []
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        name = f"{i // 10:05d}/img{i:08d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(path.read_bytes())
        table.append([name, i % 4])
    (root / "dataset.json").write_text(json.dumps(dict(labels=table)))
    with zipfile.ZipFile("edm.zip", "w") as archive:
        for path in sorted(root.rglob("*.*")):
            archive.write(path, path.relative_to(root))
    found = [kit.data.list_images(Path(name)) for name in ("edm", "edm.zip")]
    for names, labels, read, classes in found:
        assert labels.tolist() == [i % 4 for i in range(len(table))] and classes == ["0", "1", "2", "3"]
        assert names == [name for name, _ in table] and read(names[3]) == (root / names[3]).read_bytes()


def test_names_of_classes_stay_with_the_store(folder):
    """From the folders, and from the store that is made of them."""
    cfg = scm.Config(dataset="folder", data=str(folder), conditional=True)
    assert kit.dataset(cfg).names == kit.dataset(cfg).names == ["a", "b", "c"]
