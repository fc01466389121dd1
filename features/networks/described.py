"""Networks whose files say how images are prepared for them, unless the user says it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from features.errors import ConfigurationError
from features.networks.backbones import Backbone
from features.networks.descriptions import card_license, read_preprocess
from features.networks.imageinput import ImageInput, check_patches
from features.recipe import NetworkOptions, Normalisation, PixelRule


@dataclasses.dataclass(frozen=True)
class Described(Backbone):
    """A network with a description of its images. Each kind of file is a subclass.

    Parameters
    ----------
    hub_license : str or None
        Licence that a hub names; None if it came from none.
    """

    _: dataclasses.KW_ONLY
    hub_license: str | None = None

    @property
    def license(self) -> str | None:
        """As the hub, the description or the model card says."""
        with contextlib.suppress(ConfigurationError):  # there may be no description
            if self.hub_license is None and self.image_input is not None and self.image_input.license is not None:
                return self.image_input.license
        return self.hub_license or (None if self.card is None else card_license(self.card))

    @property
    def card(self) -> Path | None:
        """Folder in which its model card would lie; None if that is not its own."""
        return None

    @property
    def image_input(self) -> ImageInput | None:
        """What its own files say; None if it takes RGB 0-255 and prepares them itself."""
        raise NotImplementedError

    @property
    def own_prefix(self) -> int | None:
        """Tokens before those of the image, if the kind of network tells; None if it does not."""
        return None

    @property
    def larger(self) -> str:
        """How a network is had that takes other sizes, as the end of a sentence."""
        return ""

    def pixel_rule(self, options: NetworkOptions) -> PixelRule:
        """As the options say, and else the description; a network of fixed size takes no other."""
        default: PixelRule | int | tuple[int, int]
        found = self._found(options)
        if found is not None:
            described = PixelRule(found.height, found.width, resize=found.resize, fit=found.fit)
            default = PixelRule.of(NetworkOptions(image_size=self.fixed_size), described)
        elif options.preprocess is None:
            default = options.image_size or self.default_size  # a network for any size has none of its own
        else:
            default = self.fixed_size or (224, 224)
        rule = PixelRule.of(options, default)
        if self.fixed_size not in (None, (rule.height, rule.width)):
            height, width = self.fixed_size
            raise ConfigurationError(
                f"image size: received {rule.height}x{rule.width}, but {self.own_weights} takes images of {height}x{width} pixels "
                f"only; omit --image-size{self.larger}"
            )
        size = rule.height, rule.width
        if found is not None and size not in (
            self.fixed_size,
            (found.height, found.width),
        ):  # these need not be whole patches
            check_patches(found.source, found.patch, size)
        return rule

    def normalisation(self, options: NetworkOptions) -> Normalisation | None:
        """As the options or the description say."""
        if isinstance(options.preprocess, Normalisation):
            return options.preprocess
        found = self._found(options)
        return None if found is None else Normalisation(found.scale, found.mean, found.std, found.channels)

    def prefix_tokens(self, options: NetworkOptions) -> int | None:
        """As the options or the description say; None if neither does."""
        if options.prefix_tokens is not None:
            return options.prefix_tokens
        found = self._found(options)
        return self.own_prefix if found is None or found.prefix_tokens is None else found.prefix_tokens

    def has_class_token(self, options: NetworkOptions) -> bool:
        """As the options say, or else the description; a first token that nothing is known of is taken for one."""
        found = self._found(options) if options.prefix_tokens is None else None
        return self.prefix_tokens(options) != 0 and (found is None or found.class_token is not False)

    def patch(self, options: NetworkOptions) -> int | None:
        """As the description says."""
        found = self._found(options)
        return None if found is None else found.patch

    def _found(self, options: NetworkOptions) -> ImageInput | None:
        """The description, or that in the options; None where these give the numbers alone, as those of a recipe do."""
        if options.preprocess is None:
            return self.image_input
        given = options.preprocess
        return None if isinstance(given, Normalisation) else read_preprocess(Path(str(given)).expanduser())
