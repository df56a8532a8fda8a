"""A reward of the pictures alone, for the recipe r0: how far their pixels differ from the mean colour."""


def contrast(pixels, prompts):
    """pixels float32 [K, F, 3, H, W] from 0 to 1 -> [K]: the standard deviation over the picture, averaged."""
    return pixels.flatten(3).std(dim=3).mean(dim=(1, 2))


contrast.batched = True
contrast.takes = "pixels"
