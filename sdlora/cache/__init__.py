"""What the frozen base makes of images and captions, kept between runs."""
