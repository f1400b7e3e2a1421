"""Images in, batches out."""

from __future__ import annotations

import errno
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from neuralode_coupled.train import ImageData, image_sources
from neuralode_coupled.train.data import EvenBatches, augment, channel_statistics
from neuralode_coupled.train.image_sources import stratified_order
from tests.helpers.images import image_folder


def ready(**options) -> ImageData:
    images = ImageData(**options)
    images.prepare_data()
    images.setup()
    return images


def epoch_of(images: ImageData, epoch: int) -> torch.Tensor:
    loader = images.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return torch.cat([labels for _, labels in loader])


def test_digits_are_1797_images_split_once_and_for_all():
    images = ready()
    assert images.train.pixels.shape == (1437, 3, 32, 32)
    assert images.test.pixels.shape == (360, 3, 32, 32)
    assert images.train.pixels.dtype == torch.uint8
    assert images.train.pixels.max() == 255
    assert images.classes == 10
    assert images.train.labels.bincount().min() > 130
    assert images.test.labels.bincount().min() >= 34
    everything = torch.cat([images.train.pixels, images.test.pixels]).flatten(1).unique(dim=0)
    # scikit-learn's digits hold no image twice, so neither do the two parts together.
    assert len(everything) == 1797
    assert torch.equal(ready(seed=5).test.pixels, images.test.pixels)


def test_normalised_training_images_have_mean_0_and_variance_1_in_every_channel(tmp_path):
    images = ready(name="folder", root=image_folder(tmp_path))
    normalised = images.normalise(images.train.pixels)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.var((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_a_constant_channel_does_not_divide_by_zero():
    _, deviation = channel_statistics(torch.full((2, 3, 4, 4), 7, dtype=torch.uint8))
    assert (deviation > 0).all()


def test_a_loader_gives_whole_batches_and_each_image_once():
    images = ready(batch_size=100)
    sizes = [len(labels) for _, labels in images.train_dataloader()]
    assert sum(sizes) == 1437
    assert sizes[:-1] == [100] * 14
    labels = torch.cat([labels for _, labels in images.val_dataloader()])
    assert torch.equal(labels, images.test.labels)


def test_images_go_to_the_device_that_trains_and_are_fetched_there():
    """The meta device stands for another than the host: its tensors hold nothing, and mix with no others."""
    images = ready(batch_size=100)
    there = torch.device("meta")
    images.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=there), world_size=1, global_rank=0)
    for loader, count in ((images.train_dataloader(), 1437), (images.val_dataloader(), 360)):
        batches = list(loader)
        assert {part.device for batch in batches for part in batch} == {there}
        assert sum(len(labels) for _, labels in batches) == count


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again, other = ready(seed=1, limit=200), ready(seed=1, limit=200), ready(seed=2, limit=200)
    epoch_of(again, 0)
    torch.rand(3)  # nor on what the program has drawn
    assert torch.equal(epoch_of(first, 3), epoch_of(again, 3))
    assert not torch.equal(epoch_of(first, 3), epoch_of(first, 4))
    assert not torch.equal(epoch_of(first, 3), epoch_of(other, 3))


def test_a_loader_leaves_the_global_generator_alone():
    images = ready(limit=50)
    before = torch.get_rng_state()
    list(images.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_limit_keeps_the_proportions_and_is_part_of_a_larger_one():
    small, large = ready(limit=100), ready(limit=300, seed=9)
    assert len(small.train) == 100
    assert small.train.labels.bincount(minlength=10).tolist() == pytest.approx([10] * 10, abs=1)
    assert torch.equal(large.train.pixels[:100], small.train.pixels)
    assert len(small.test) == 360


def test_every_beginning_of_a_stratified_order_is_proportional():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert sorted(labels[order[:3]].tolist()) == [0, 1, 2]
    assert labels[order[:50]].bincount().tolist() == pytest.approx([30, 15, 5], abs=1)


@pytest.mark.parametrize(("count", "batch_size", "devices"), [(10, 4, 1), (9, 4, 2), (7, 2, 3), (5, 1, 2)])
def test_devices_share_the_test_images_in_equally_many_batches(count, batch_size, devices):
    shares = [list(EvenBatches(count, batch_size, devices, rank)) for rank in range(devices)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(share) == len(EvenBatches(count, batch_size, devices, 0)) for share in shares)
    assert sorted(i for share in shares for batch in share for i in batch.tolist()) == list(range(count))
    assert all(1 <= len(batch) <= batch_size + 1 for share in shares for batch in share)


def test_augmentation_is_a_crop_of_each_padded_image():
    pixels = torch.randint(1, 256, (40, 3, 32, 32), dtype=torch.uint8)
    out = augment(pixels, flip=False)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    corners = []
    for image, whole in zip(out, padded, strict=True):
        found = [(y, x) for y in range(9) for x in range(9) if torch.equal(image, whole[:, y : y + 32, x : x + 32])]
        assert len(found) == 1
        corners += found
    # One corner for all, or one axis that never moves, would pass the loop above.
    assert len({y for y, _ in corners}) > 3
    assert len({x for _, x in corners}) > 3


def test_half_of_the_images_are_mirrored_if_asked():
    pixels = torch.arange(1, 33, dtype=torch.uint8).expand(400, 3, 32, 32).contiguous()
    rising = augment(pixels, flip=True)[:, 0, 16, 14:18].int().diff().sum(1) > 0
    assert 140 < int(rising.sum()) < 260
    assert (augment(pixels, flip=False)[:, 0, 16, 14:18].int().diff().sum(1) > 0).all()


def test_a_folder_is_read_with_its_classes_and_resized(tmp_path):
    with pytest.warns(UserWarning, match="^images of 20x20 are resized to 32x32$"):
        images = ready(name="folder", root=image_folder(tmp_path, size=20))
    assert images.class_names == ("class0", "class1", "class2")
    assert images.train.pixels.shape == (24, 3, 32, 32)
    assert images.test.labels.bincount().tolist() == [4, 4, 4]
    # The class's colour is the brightest channel of each of its images.
    brightest = images.train.pixels.float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, images.train.labels)


def test_unknown_data_set_lists_the_choices():
    with pytest.raises(ValueError, match=r"unknown data set 'mnist': choose one of digits, cifar10, folder"):
        ImageData("mnist")


def test_a_folder_that_is_missing_or_not_given(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        ImageData("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'folder' needs a root"):
        ImageData("folder")


def test_a_folder_without_splits_or_classes(tmp_path):
    with pytest.raises(ValueError, match="there is no 'train' in"):
        ImageData("folder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train.* has no classes"):
        ImageData("folder", tmp_path)
    (tmp_path / "train" / "cats").mkdir()
    with pytest.raises(ValueError, match="there is no 'test' in"):
        ImageData("folder", tmp_path)
    (tmp_path / "test" / "dogs").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"only in train: \['cats'\], only in test: \['dogs'\]"):
        ImageData("folder", tmp_path)


def test_a_class_without_images_and_an_image_that_is_none(tmp_path):
    root = image_folder(tmp_path, train=2, test=1)
    (root / "train" / "class1" / "0.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read the image .*class1/0.png"):
        ready(name="folder", root=root)
    for file in (root / "train" / "class1").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"class1.*\.png"):
        ready(name="folder", root=root)


@pytest.mark.parametrize(
    ("name", "pixels", "mode"),
    [("0.png", np.full((32, 32), 40000, np.uint16), "I;16"), ("0.tiff", np.full((32, 32), 0.5, np.float32), "F")],
)
def test_an_image_whose_values_8_bits_do_not_hold_is_refused(tmp_path, name, pixels, mode):
    """Pillow would clip them: all white, or all black."""
    root = image_folder(tmp_path, train=2, test=1)
    Image.fromarray(pixels).save(root / "train" / "class1" / name)
    message = rf"class1/{name}' has the mode {mode}, .* 0 to 255 .*: convert it to 8 bits"
    with pytest.raises(ValueError, match=message):
        ready(name="folder", root=root)


def test_an_image_that_would_be_left_out_is_refused_and_other_files_are_not(tmp_path):
    root = image_folder(tmp_path, train=8, test=1)
    for name in ("notes.txt", "Thumbs.db", "list.pdf"):
        (root / "train" / "class1" / name).touch()
    assert len(ready(name="folder", root=root).train) == 24
    Image.new("L", (32, 32)).save(root / "train" / "class1" / "x.GIF")
    with pytest.raises(ValueError, match=r"class1/x.GIF' would be left out: .* are .jpg, .*.png.*: convert it, or"):
        ready(name="folder", root=root)


def test_links_are_not_followed_and_what_is_passed_over_is_counted(tmp_path):
    """One to the parent would never end; one to another class would bring its images in under a second label."""
    root = image_folder(tmp_path / "images", train=8, test=1)
    train = root / "train"
    (train / "class1" / "up").symlink_to(train)
    (train / "class1" / "another.png").symlink_to(train / "class0" / "0.png")
    (train / "class2" / "more").symlink_to(train / "class0")
    (train / "class3").symlink_to(train / "class0")
    os.mkfifo(train / "class2" / "pipe.png")
    (train / "class2" / "inner").mkdir()
    (train / "class2" / "0.png").rename(train / "class2" / "inner" / "0.png")
    with pytest.warns(UserWarning, match=r"train': 4 links and 1 other thing that is no file were passed over") as told:
        images = ready(name="folder", root=root)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert images.class_names == ("class0", "class1", "class2")
    assert images.train.labels.bincount().tolist() == [8, 8, 8]
    link = tmp_path / "link"
    link.symlink_to(root)  # the root is where the user points to
    with pytest.warns(UserWarning, match="4 links"):
        assert len(ready(name="folder", root=link).train) == 24


def test_a_split_or_every_class_that_is_a_link_is_refused(tmp_path):
    root = image_folder(tmp_path, train=2, test=1)
    (root / "test").rename(root / "real")
    (root / "test").symlink_to(root / "train")
    with pytest.raises(ValueError, match=r"test' is a link, and links are not followed: put the folder itself there"):
        ImageData("folder", root)
    (root / "test").unlink()
    (root / "test").mkdir()
    for label in range(3):
        (root / "test" / f"class{label}").symlink_to(root / "real" / f"class{label}")
    with pytest.raises(ValueError, match=r"test' has no classes.*one folder per class, .* \(links are not followed\)"):
        ImageData("folder", root)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    root, scandir = image_folder(tmp_path, train=2, test=1), os.scandir
    closed = root / "train" / "class0" / "inner"
    closed.mkdir()

    def refuse(path):
        if str(path) == str(closed):
            raise PermissionError(errno.EACCES, "permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="inner"):
        ready(name="folder", root=root)


def test_an_image_that_a_decoder_fails_at_is_named(tmp_path):
    root = image_folder(tmp_path, train=2, test=1)
    path = root / "train" / "class1" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:16] + bytes(9) + whole[25:])  # no size: Pillow raises a SyntaxError
    with pytest.raises(ValueError, match=r"cannot read the image .*class1/0.png"):
        ready(name="folder", root=root)
    Image.new("1", (20000, 10000)).save(path)
    with pytest.raises(ValueError, match=r"cannot read the image .*class1/0.png': .*200000000 pixels"):
        ready(name="folder", root=root)


def test_limits_and_batches_that_cannot_be_met():
    with pytest.raises(ValueError, match="limit must be at least the number of classes, 10, got 9"):
        ImageData(limit=9)
    with pytest.raises(ValueError, match="limit must be at most the number of training images, 1437, got 2000"):
        ready(limit=2000)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        ImageData(batch_size=0)
    with pytest.raises(ValueError, match="digits are part of scikit-learn and need no root"):
        ImageData(root="somewhere")


def test_a_torchvision_of_another_torch_is_named_with_its_cure(monkeypatch, tmp_path):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"nms does not exist.*pip install --upgrade torch torchvision"):
        ready(name="folder", root=image_folder(tmp_path, train=1, test=1))


def test_a_torchvision_that_is_missing_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(
        ImportError, match=r'torchvision is not installed: run `pip install "neuralode-coupled\[train\]"`'
    ):
        ready(name="folder", root=image_folder(tmp_path, train=1, test=1))


def test_cifar10_that_cannot_be_downloaded_is_one_clear_error(monkeypatch, tmp_path):
    class Offline:
        @staticmethod
        def CIFAR10(*args, **kwargs):
            raise OSError("no network")

    monkeypatch.setattr(image_sources, "_torchvision_datasets", lambda: Offline)
    with pytest.raises(ConnectionError, match=r"cannot get CIFAR-10 into .*no network.*'folder'"):
        ImageData("cifar10", tmp_path).prepare_data()


def test_cifar10_as_torchvision_holds_it(monkeypatch, tmp_path):
    class Datasets:
        class CIFAR10:
            def __init__(self, root, train, download):
                count = 50 if train else 10
                self.data = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
                self.targets = [i % 10 for i in range(count)]

    monkeypatch.setattr(image_sources, "_torchvision_datasets", lambda: Datasets)
    images = ready(name="cifar10", root=tmp_path, limit=20)
    assert images.train.pixels.shape == (20, 3, 32, 32)
    assert images.train.labels.bincount().tolist() == [2] * 10
    whole = Datasets.CIFAR10(tmp_path, train=False, download=False)
    assert torch.equal(images.test.pixels[3, 1], torch.from_numpy(whole.data[3, :, :, 1]))
    assert images.batch_size == 256


def test_validation_images_are_kept_back_from_training_and_tested_on():
    every, images = ready(), ready(validation=100)
    assert (len(images.train), len(images.test)) == (len(every.train) - 100, 100)
    together = torch.cat([images.train.pixels, images.test.pixels]).flatten(1)
    assert len(together.unique(dim=0)) == len(every.train.pixels.flatten(1).unique(dim=0))
    assert images.test.labels.bincount().min() >= 9  # every class in proportion
    limited = ready(validation=100, limit=50, seed=7)
    assert len(limited.train) == 50
    assert torch.equal(limited.test.pixels, images.test.pixels)


def test_more_images_than_there_are_beside_the_validation_images():
    with pytest.raises(ValueError, match="validation must be at least the number of classes, 10, got 5"):
        ImageData(validation=5)
    with pytest.raises(ValueError, match="1437, of which validation keeps back 1000, got 500"):
        ready(validation=1000, limit=500)
    with pytest.raises(ValueError, match="of 1437 training images validation keeps back 1437: keep back less"):
        ready(validation=1437)
