"""A demo that needs nothing downloaded: videos of moving shapes, and a VAE and a caption rewriter
small enough to ship, trained on such videos by the two scripts beside them."""
