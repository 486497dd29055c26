//! Whether VMs may be started on this host now.
//!
//! Every start of a VM, and every standby taken in, holds a [`Permit`] from before it asks the
//! registry until its worker is known by name. Whoever stops all VMs first closes the gate and
//! then waits until no permit is out: what it finds then is all there is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The gate of one host.
#[derive(Clone)]
pub struct Gate(Arc<Mutex<Inner>>);

struct Inner {
    closed: Option<String>,
    out: usize,
}

/// Leave to start one VM; given back when dropped.
pub struct Permit(Gate);

impl Gate {
    /// A gate that is open.
    #[must_use]
    pub fn open() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            closed: None,
            out: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on no start begins, because of `why`.
    pub fn close(&self, why: impl Into<String>) {
        self.lock().closed = Some(why.into());
    }

    /// Starts may begin.
    pub fn set_open(&self) {
        self.lock().closed = None;
    }

    /// Leave to start a VM.
    ///
    /// # Errors
    /// Why there is none now.
    pub fn permit(&self) -> Result<Permit, String> {
        let mut inner = self.lock();
        if let Some(why) = &inner.closed {
            return Err(why.clone());
        }
        inner.out += 1;
        Ok(Permit(self.clone()))
    }

    /// Whether no start is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.lock().out == 0
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.lock().out -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::Gate;

    #[test]
    fn a_closed_gate_lets_nobody_in_and_waits_for_those_who_are() {
        let gate = Gate::open();
        let permit = gate.permit().unwrap();
        gate.close("given up");
        assert!(!gate.is_idle());
        assert_eq!(gate.permit().err().as_deref(), Some("given up"));
        drop(permit);
        assert!(gate.is_idle());
        gate.set_open();
        assert!(gate.permit().is_ok());
    }
}
