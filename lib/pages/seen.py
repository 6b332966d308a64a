"""seen: a picture at the resolution that the model gets: resized, cropped or cut into tiles."""
import torch
from PIL import Image


def seen(processor, image: Image.Image) -> list[Image.Image]:
    """[the picture as the model sees it], or the tiles that it is cut into; [] where the tensors don't tell.

    Some processors return patches in an order of their own, but say how many there are along each side: for
    them the picture is resized to that. Others return pixels [..., 3, height, width], which are shown.
    """
    images = processor.image_processor
    made = images(images=[image], return_tensors="pt")
    if "image_grid_thw" in made:
        rows, columns = made["image_grid_thw"][0, 1:].tolist()
    elif "image_position_ids" in made:
        columns, rows = (made["image_position_ids"][0].amax(0) + 1).tolist()
    else:
        pixels = torch.as_tensor(made["pixel_values"]) if "pixel_values" in made else torch.empty(0)
        whole = pixels.dim() >= 4 and pixels.shape[-3] == 3
        return [as_picture(tile, images) for tile in pixels.flatten(0, -4) if tile.any()] if whole else []
    return [image.resize((columns * images.patch_size, rows * images.patch_size), Image.Resampling.BICUBIC)]


def as_picture(pixels: torch.Tensor, images) -> Image.Image:
    """A processor's pixels [3, height, width] as a picture, its normalisation undone."""
    pixels = pixels.float()
    if images.do_normalize:
        mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (images.image_mean, images.image_std))
        pixels = pixels * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def in_words(record: dict, pictures: list[Image.Image]) -> str:
    """The size of a sample's picture, and the size at which the model sees it, in words."""
    given = f"{record['width']} × {record['height']}"
    if not pictures:
        return given
    width, height = pictures[0].size
    as_tiles = f"as {len(pictures)} tiles of" if len(pictures) > 1 else "at"
    return f"{given}, seen {as_tiles} {width} × {height}"
