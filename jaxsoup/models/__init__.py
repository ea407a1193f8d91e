"""Models in Flax nnx, small enough to read in one sitting."""

from jaxsoup.models.vit import ViT as ViT
