"""The models. They do not depend on devices, gin files, datasets or distribution."""
