//! Keys changed while the session stands.

use super::links::{cabled, stream};
use super::*;

#[test]
fn a_key_is_changed_link_by_link_without_an_interruption() {
    for links in [2, 1] {
        // Once so that the side that dials stays the same, once so that it changes.
        for stays in [true, false] {
            let mut cabled = cabled(links);
            cabled.all_up();
            let two = cabled.two.interconnect.clone();
            let old = cabled.two.fingerprint;
            let own = cabled.one.fingerprint;
            let new = loop {
                let new = Arc::new(Identity::generate().unwrap());
                if (own < new.fingerprint()) == stays {
                    break new;
                }
            };
            let one = cabled.one.interconnect.clone();
            one.set_pins(vec![old, new.fingerprint()]);
            two.set_identity(Arc::clone(&new));
            let every = if links == 1 { vec![0] } else { vec![0, 1] };
            stream(&mut cabled, 4, 100_000, |epoch, cabled| {
                let link = usize::try_from(epoch / 2).unwrap();
                if epoch % 2 == 0 && link < links {
                    cabled.two.interconnect.redial(link);
                }
            });
            one.set_pins(vec![new.fingerprint()]);
            cabled.one.links_up(&every);
            cabled.two.links_up(&every);
            for link in &every {
                one.redial(*link);
                // Down and up again, with the new key alone.
                let mut rest = every.clone();
                rest.retain(|other| other != link);
                cabled.one.links_up(&rest);
                cabled.one.links_up(&every);
            }
            stream(&mut cabled, 4, 100_000, |_, _| {});
            assert_eq!(one.session(), Some(SessionId(1)), "{links} links");
        }
    }
}
