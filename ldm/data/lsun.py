"""LSUN churches, bedrooms and cats: list files of pictures."""

from __future__ import annotations

from ldm.data.folder import ListedPictures


class LSUNBase(ListedPictures):
    """Center-cut pictures listed in `txt_file`, flipped at random unless validating."""

    default_flip_p = 0.5


class LSUNChurchesTrain(LSUNBase):
    """Outdoor churches, training part."""

    list_file = "data/lsun/church_outdoor_train.txt"
    default_root = "data/lsun/churches"


class LSUNChurchesValidation(LSUNBase):
    """Outdoor churches, validation part."""

    list_file = "data/lsun/church_outdoor_val.txt"
    default_root = "data/lsun/churches"
    split = "validation"
    default_flip_p = 0.0


class LSUNBedroomsTrain(LSUNBase):
    """Bedrooms, training part."""

    list_file = "data/lsun/bedrooms_train.txt"
    default_root = "data/lsun/bedrooms"


class LSUNBedroomsValidation(LSUNBase):
    """Bedrooms, validation part."""

    list_file = "data/lsun/bedrooms_val.txt"
    default_root = "data/lsun/bedrooms"
    split = "validation"
    default_flip_p = 0.0


class LSUNCatsTrain(LSUNBase):
    """Cats, training part."""

    list_file = "data/lsun/cat_train.txt"
    default_root = "data/lsun/cats"


class LSUNCatsValidation(LSUNBase):
    """Cats, validation part."""

    list_file = "data/lsun/cat_val.txt"
    default_root = "data/lsun/cats"
    split = "validation"
    default_flip_p = 0.0
